"""Helpers that several tests share; nothing here is part of the product."""
