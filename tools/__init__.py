"""Tools of a maintainer, run from the checkout: tuning, ceilings, profiles, the steps for a GPU."""
