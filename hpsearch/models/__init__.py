"""The UNet: its configuration, its shapes and memory by arithmetic, and the network itself."""
