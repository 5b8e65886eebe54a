"""What every model needs: optional imports, the hub, device and dtype."""
