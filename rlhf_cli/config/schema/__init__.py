"""Every key of every stage: its name, type, bound and meaning. Values live in conf/*.yaml only.

A field without a default is mandatory for OmegaConf, so a key that is forgotten in YAML fails by
name. `rlhf-cli STAGE --help` prints these sentences; validate.py enforces the bounds, and a value
where something reads a key, and only there.
"""
