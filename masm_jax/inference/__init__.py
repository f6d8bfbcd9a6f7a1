"""From a scan to a segmentation in the grid of the scan."""
