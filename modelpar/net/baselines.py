"""The nets to compare with: torchvision's AlexNet, and the small ones for CIFAR-10."""
