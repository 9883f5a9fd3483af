"""The backends of the heavy op; see base.py for what they share."""
