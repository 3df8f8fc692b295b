"""Operators of the domain `angelforge`: schema, shape rule, function body, kernel."""
