"""The decoder: its configs, presets, parameters, layout, positions and FLOPs."""
