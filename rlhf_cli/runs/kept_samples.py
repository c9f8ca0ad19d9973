"""What an unfinished generate or evaluate has made: it goes on from there, prompt by prompt.

Responses are kept as they are sampled, with all that is needed to go on as if they had just been;
what judges say of them, by blocks of prompts. Both lie where resume points do, and go with them.
"""

SCORED_AT_ONCE = 256  # prompts whose responses a judge gets in one call


class KeptSamples:
    """The responses and scores of one run, on disk."""
