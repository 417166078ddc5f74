"""The stages that train the bundled model from nothing: scene reader, VAE, text encoder, UNet, packaging."""
