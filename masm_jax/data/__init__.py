"""Finding, checking, preparing and feeding scans."""
