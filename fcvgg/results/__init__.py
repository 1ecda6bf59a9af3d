"""What a network says of an image: score maps, heatmaps, label maps, boxes, figures."""
