"""Networks: their modules, and their shapes, memory and FLOPs by arithmetic."""
