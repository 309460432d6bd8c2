"""Configurations of transformers' CLIP and SigLIP repositories: `config.json` and `preprocessor_config.json`, both ways."""
