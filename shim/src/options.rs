//! The runtime options that containerd passes with `Create`, and the configuration that they lead to.

use std::path::PathBuf;

use containerd_shim::protos::protobuf::rt::skip_field_for_tag;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::protobuf::{CodedInputStream, Error as ProtobufError};
use husk_config::{Config, ConfigError};

use crate::error::Error;

/// `runtimeoptions.v1.Options` of containerd, which `ctr run --runtime-config-path` and CRI's `ConfigPath` send. None of
/// the crates that the shim uses has it, and it is three fields.
#[derive(Debug, Default, PartialEq, Eq)]
struct RuntimeOptions {
    config_path: String,
    config_body: Vec<u8>,
}

impl RuntimeOptions {
    /// Field number and wire type (length-delimited) as they stand before the value.
    const CONFIG_PATH: u32 = 2 << 3 | 2;
    const CONFIG_BODY: u32 = 3 << 3 | 2;

    fn parse(bytes: &[u8]) -> Result<Self, ProtobufError> {
        let mut options = Self::default();
        let mut input = CodedInputStream::from_bytes(bytes);
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            match tag {
                Self::CONFIG_PATH => options.config_path = input.read_string()?,
                Self::CONFIG_BODY => options.config_body = input.read_bytes()?,
                other => skip_field_for_tag(other, &mut input)?,
            }
        }
        Ok(options)
    }
}

/// The configuration that the request's options name; `/etc/husk/husk.toml` if they name none.
///
/// # Errors
/// `Config` with file, line and key; `UnknownOptions` for a message of another runtime.
pub(crate) fn config(options: Option<&Any>) -> Result<Config, Error> {
    let Some(any) = options.filter(|any| !any.type_url.is_empty()) else {
        return load_default();
    };
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    match name {
        // 1.6 calls the package `cri.runtimeoptions.v1`.
        "runtimeoptions.v1.Options" | "cri.runtimeoptions.v1.Options" => {}
        // Sent by clients that know no runtime but runc, the second by ctr 1.6 with a user namespace. Nothing in them is for us.
        "containerd.runc.v1.Options" | "containerd.linux.runc.CreateOptions" => {
            return load_default();
        }
        other => return Err(Error::UnknownOptions(other.to_owned())),
    }
    let options = RuntimeOptions::parse(&any.value).map_err(|source| Error::InvalidRequest {
        what: "runtime options",
        source: source.into(),
    })?;
    if !options.config_body.is_empty() {
        let body =
            String::from_utf8(options.config_body).map_err(|source| Error::InvalidRequest {
                what: "configuration body",
                source: source.into(),
            })?;
        return Config::from_toml(&body, "config_body").map_err(Error::Config);
    }
    if options.config_path.is_empty() {
        return load_default();
    }
    Config::load(&PathBuf::from(options.config_path)).map_err(Error::Config)
}

fn load_default() -> Result<Config, Error> {
    Config::load_default().map_err(|err: ConfigError| Error::Config(err))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn any(type_url: &str, value: &[u8]) -> Any {
        Any {
            type_url: type_url.to_owned(),
            value: value.to_vec(),
            ..Any::default()
        }
    }

    /// Field 1 "husk", field 2 the path, as containerd's marshaller writes them.
    fn options_with_path(path: &str) -> Vec<u8> {
        let mut bytes = b"\x0a\x04husk\x12".to_vec();
        bytes.push(u8::try_from(path.len()).unwrap());
        bytes.extend_from_slice(path.as_bytes());
        bytes
    }

    #[test]
    fn config_path_is_loaded() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "[vm]\nmemory_mib = 333").unwrap();
        let bytes = options_with_path(file.path().to_str().unwrap());
        for name in ["runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options"] {
            assert_eq!(
                config(Some(&any(name, &bytes))).unwrap().vm().memory_mib(),
                333
            );
        }
    }

    #[test]
    fn bad_key_is_named_with_file_and_line() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "[vm]\nmemory = 333").unwrap();
        let path = file.path().to_str().unwrap();
        let bytes = options_with_path(path);
        let err = config(Some(&any("runtimeoptions.v1.Options", &bytes))).unwrap_err();
        let text = err.chain();
        assert!(
            text.contains(&format!("{path}:2")) && text.contains("memory"),
            "{text}"
        );
    }

    #[test]
    fn config_body_wins_over_path() {
        let body = "[vm]\nvcpus = 3\n";
        let mut bytes = options_with_path("/absent");
        bytes.push(0x1a);
        bytes.push(u8::try_from(body.len()).unwrap());
        bytes.extend_from_slice(body.as_bytes());
        let config = config(Some(&any("runtimeoptions.v1.Options", &bytes))).unwrap();
        assert_eq!(config.vm().vcpus(), 3);
    }

    #[test]
    fn truncated_options_are_refused() {
        let err = config(Some(&any("runtimeoptions.v1.Options", b"\x12\x40/etc"))).unwrap_err();
        assert!(matches!(err, Error::InvalidRequest { .. }));
    }

    #[test]
    fn options_of_runc_are_tolerated_and_others_are_not() {
        let path = husk_config::DEFAULT_PATH;
        if !std::path::Path::new(path).exists() {
            for name in [
                "containerd.runc.v1.Options",
                "containerd.linux.runc.CreateOptions",
            ] {
                assert!(config(Some(&any(name, b""))).is_ok());
            }
            assert!(config(None).is_ok());
        }
        assert!(matches!(
            config(Some(&any("example.Options", b""))),
            Err(Error::UnknownOptions(name)) if name == "example.Options"
        ));
    }
}
