"""Measurements against the stated alternatives, made so that anybody can repeat them with one command."""
