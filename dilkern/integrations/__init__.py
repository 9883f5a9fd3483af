"""Adapters to trainers; each module imports its library, none is imported by `import dilkern`."""
