"""Gates: which experts a token goes to, recognised, cut out, counted and drawn."""
