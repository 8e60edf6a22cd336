"""From a `Subject` to a `Traced`: an FX program, and for which sizes it holds."""
