"""The systems that SaShiMi is compared with, one file each."""
