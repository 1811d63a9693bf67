"""What every room may use: settings, files, where pretrained weights lie, faster products."""
