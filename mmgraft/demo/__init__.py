"""The whole job on a small real model: what ``mmgraft demo`` runs."""
