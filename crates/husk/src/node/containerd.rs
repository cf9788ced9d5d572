//! The runtime handler in containerd's configuration (docs/cri/config.md of containerd).
//!
//! The file is edited in place, for every version of containerd alike: up to 1.7 a file that is imported replaces the
//! whole configuration of the plug-in instead of adding to it.

use toml_edit::{Array, DocumentMut, Item, Table, TableLike, value};

/// By the name of the RuntimeClass' handler.
const HANDLER: &str = "husk";
const RUNTIME_TYPE: &str = "io.containerd.husk.v2";
/// The runtime that containerd has without being told.
const DEFAULT: &str = "runc";
const DEFAULT_TYPE: &str = "io.containerd.runc.v2";
/// Before what is written of the default, by which it is found again.
const DEFAULT_NOTE: &str =
    "\n# containerd's default. Up to 1.7 it knows none if another runtime, husk, is configured.\n";
/// The version of configurations up to containerd 1.7, which later ones read as well.
const OLD: i64 = 2;
const RUNTIMES: &str = "runtimes";
/// Those that pods may set, and a node lets through.
const ANNOTATIONS: &str = "io.husk.*";

/// Why a configuration is not touched.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// It is no TOML.
    #[error("is not TOML")]
    Syntax(#[from] toml_edit::TomlError),
    /// A version whose layout is not known.
    #[error(
        "has version {0}, and only 2 and 3 are known; \
         `containerd config migrate` prints it in the newest that this containerd has"
    )]
    Version(i64),
    /// Something on the way to the handler is not a table.
    #[error("{0} is not a table")]
    NoTable(String),
}

/// Adds the handler; keys that somebody has added to it stay.
pub(super) fn register(text: &str) -> Result<String, Refusal> {
    let mut document = text.parse::<DocumentMut>()?;
    if document.is_empty() {
        // Every containerd since 1.5 reads it.
        document["version"] = value(OLD);
    }
    let version = version(document.as_table());
    let mut at: &mut dyn TableLike = document.as_table_mut();
    for key in path(version, HANDLER)? {
        let item = at.entry(key).or_insert_with(|| {
            let mut table = Table::new();
            table.set_implicit(key != HANDLER);
            Item::Table(table)
        });
        at = item
            .as_table_like_mut()
            .ok_or_else(|| Refusal::NoTable(key.to_owned()))?;
        if key == RUNTIMES && version == OLD && !at.contains_key(DEFAULT) {
            let mut runc = Table::new();
            runc.insert("runtime_type", value(DEFAULT_TYPE));
            runc.decor_mut().set_prefix(DEFAULT_NOTE);
            at.insert(DEFAULT, Item::Table(runc));
        }
    }
    at.entry("runtime_type").or_insert(value(RUNTIME_TYPE));
    // Privileged means root in the guest, and the devices of the guest.
    at.entry("privileged_without_host_devices")
        .or_insert(value(true));
    at.entry("pod_annotations")
        .or_insert(value(Array::from_iter([ANNOTATIONS])));
    Ok(document.to_string())
}

/// Takes the handler out, and the tables around it that hold nothing else.
pub(super) fn unregister(text: &str) -> Result<String, Refusal> {
    let mut document = text.parse::<DocumentMut>()?;
    if document.is_empty() {
        return Ok(text.to_owned());
    }
    let version = version(document.as_table());
    let default = path(version, DEFAULT)?;
    if has_note(document.as_table(), &default) {
        remove(document.as_table_mut(), &default);
    }
    remove(document.as_table_mut(), &path(version, HANDLER)?);
    Ok(document.to_string())
}

/// Whether the table at `path` is the default that [`register`] wrote.
fn has_note(root: &dyn TableLike, path: &[&str]) -> bool {
    let (last, way) = path.split_last().expect("it leads to a runtime");
    let mut at = root;
    for key in way {
        match at.get(key).and_then(Item::as_table_like) {
            Some(table) => at = table,
            None => return false,
        }
    }
    let table = at.get(last).and_then(Item::as_table);
    let prefix = table.and_then(|table| table.decor().prefix()?.as_str());
    prefix.is_some_and(|prefix| prefix.ends_with(DEFAULT_NOTE.trim_start()))
}

fn remove(table: &mut dyn TableLike, path: &[&str]) {
    let Some((key, rest)) = path.split_first() else {
        return;
    };
    if rest.is_empty() {
        table.remove(key);
        return;
    }
    let Some(below) = table.get_mut(key).and_then(Item::as_table_like_mut) else {
        return;
    };
    let was_empty = below.is_empty();
    remove(below, rest);
    if below.is_empty() && !was_empty {
        table.remove(key);
    }
}

/// Without a version a configuration is of the first.
fn version(root: &dyn TableLike) -> i64 {
    root.get("version").and_then(Item::as_integer).unwrap_or(1)
}

/// Where a runtime is in a configuration of that version.
fn path(version: i64, runtime: &'static str) -> Result<[&'static str; 5], Refusal> {
    let plugin = match version {
        OLD => "io.containerd.grpc.v1.cri",
        3 => "io.containerd.cri.v1.runtime",
        other => return Err(Refusal::Version(other)),
    };
    Ok(["plugins", plugin, "containerd", RUNTIMES, runtime])
}

#[cfg(test)]
mod tests {
    use super::*;

    const OF_VERSION_2: &str = r#"# The site's own.
version = 2

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2" # as ever
"#;

    #[test]
    fn an_empty_configuration_gets_the_handler_beside_the_default() {
        let text = register("").unwrap();
        assert_eq!(
            text,
            r#"version = 2

# containerd's default. Up to 1.7 it knows none if another runtime, husk, is configured.
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.husk]
runtime_type = "io.containerd.husk.v2"
privileged_without_host_devices = true
pod_annotations = ["io.husk.*"]
"#
        );
        assert_eq!(unregister(&text).unwrap(), "version = 2\n");
    }

    #[test]
    fn what_is_there_stays_as_it_is_written() {
        let text = register(OF_VERSION_2).unwrap();
        assert!(text.starts_with(OF_VERSION_2), "{text}");
        assert!(text.contains(r#"[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.husk]"#));
    }

    #[test]
    fn version_3_has_another_plugin() {
        let text = register("version = 3\n").unwrap();
        assert!(
            text.contains("[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.husk]"),
            "{text}"
        );
    }

    #[test]
    fn registering_twice_is_registering_once() {
        let once = register(OF_VERSION_2).unwrap();
        assert_eq!(register(&once).unwrap(), once);
    }

    #[test]
    fn keys_of_the_site_survive() {
        let own = register("version = 3\n")
            .unwrap()
            .replace("[\"io.husk.*\"]", "[]");
        assert_eq!(register(&own).unwrap(), own);
    }

    #[test]
    fn unregistering_undoes_registering() {
        for text in [
            OF_VERSION_2,
            "version = 3\n",
            "version = 2\n[debug]\nlevel = \"info\"\n",
        ] {
            assert_eq!(unregister(&register(text).unwrap()).unwrap(), text);
            assert_eq!(unregister(text).unwrap(), text);
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        assert!(matches!(
            register("[plugins.cri]\n"),
            Err(Refusal::Version(1))
        ));
        assert!(matches!(
            register("version = 9\n"),
            Err(Refusal::Version(9))
        ));
        assert!(matches!(register("version ="), Err(Refusal::Syntax(_))));
        assert!(matches!(
            register("version = 2\nplugins = 1\n"),
            Err(Refusal::NoTable(_))
        ));
    }
}
