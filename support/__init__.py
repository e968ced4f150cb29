"""What the scripts need and a reader of SSD may skip."""
