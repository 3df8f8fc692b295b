"""Device functions that several kernels share. Imports triton, as kernel.py files do; nothing else imports it."""
