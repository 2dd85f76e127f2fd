"""Searches: candidates are proposed in generations, scored by any executor, and journaled before they are used."""
