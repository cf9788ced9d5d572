//! `husk.toml`: one file, one typed, checked [`Config`].

#![forbid(unsafe_code)]
