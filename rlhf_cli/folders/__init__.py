"""Model folders on disk: manifest, integrity, files that are whole or not there."""
