use super::*;

fn parse(text: &str) -> Result<Config, String> {
    Config::from_toml(text, "/etc/husk/husk.toml").map_err(|err| err.to_string())
}

#[test]
fn empty_text_is_the_default() {
    assert_eq!(parse(""), Ok(Config::default()));
    assert_eq!(parse("[vm]\n"), Ok(Config::default()));
}

#[test]
fn defaults_are_allowed_values() {
    let vm = Config::default().vm().clone();
    assert!(VCPUS.contains(&vm.vcpus()));
    assert!(MEMORY_MIB.contains(&vm.memory_mib()));
    assert_eq!(vm.boot_timeout(), Duration::from_secs(30));
    assert!(vm.kernel().is_absolute() && vm.initramfs().is_absolute());
}

#[test]
fn every_key_is_read() {
    let config = parse(
        r#"
        [vm]
        kernel = "/k"
        initramfs = "/i"
        kernel_params = "debug loglevel=7"
        vcpus = 4
        max_vcpus = 6
        memory_mib = 2048
        max_memory_mib = 4096
        boot_timeout_s = 5
        [network]
        datapath = "vhost"
        host_network = "isolate"
        [storage]
        sharing = "9p"
        cache = "always"
        writeback = true
        dax_window_mib = 1024
        empty_dir_disk_mib = 512
        "#,
    )
    .unwrap();
    let vm = config.vm();
    assert_eq!(vm.kernel(), Path::new("/k"));
    assert_eq!(vm.initramfs(), Path::new("/i"));
    assert_eq!(vm.kernel_params(), "debug loglevel=7");
    assert_eq!(vm.vcpus(), 4);
    assert_eq!(vm.max_vcpus(), 6);
    assert_eq!(vm.memory_mib(), 2048);
    assert_eq!(vm.max_memory_mib(), Some(4096));
    assert_eq!(vm.boot_timeout(), Duration::from_secs(5));
    let network = config.network();
    assert_eq!(network.datapath(), Datapath::Vhost);
    assert_eq!(network.host_network(), HostNetwork::Isolate);
    let storage = config.storage();
    assert_eq!(storage.sharing(), Sharing::NineP);
    assert_eq!(storage.cache(), Cache::Always);
    assert!(storage.writeback());
    assert_eq!(storage.dax_window_mib(), 1024);
    assert_eq!(storage.empty_dir_disk_mib(), 512);
}

#[test]
fn key_that_is_left_out_has_its_default() {
    let config = parse("[vm]\nvcpus = 2\n").unwrap();
    assert_eq!(config.vm().vcpus(), 2);
    assert_eq!(config.vm().kernel(), Path::new(DEFAULT_KERNEL));
}

#[test]
fn unknown_key_is_named_with_its_line_and_the_keys_there_are() {
    let err = parse("# Husk\n[vm]\nvcpu = 2\n").unwrap_err();
    assert!(
        err.starts_with(
            "/etc/husk/husk.toml:3: vm.vcpu: unknown field `vcpu`, expected one of `kernel`"
        ),
        "{err}"
    );
    assert!(err.contains("`boot_timeout_s`"), "{err}");
    assert!(!err.contains('\n'), "{err}");
}

#[test]
fn unknown_table_is_named_with_its_line() {
    let err = parse("\n[disk]\n").unwrap_err();
    assert!(
        err.starts_with("/etc/husk/husk.toml:2: disk: unknown field `disk`"),
        "{err}"
    );
}

#[test]
fn value_out_of_range_is_named_with_its_line_and_the_range() {
    for value in ["0", "256", "-1", "\"two\"", "1.5", "[1]", "99999999999"] {
        assert_eq!(
            parse(&format!("[vm]\nmemory_mib = 512\nvcpus = {value}\n")).unwrap_err(),
            format!(
                "/etc/husk/husk.toml:3: vm.vcpus is {value}; allowed is an integer from 1 to 255"
            )
        );
    }
}

#[test]
fn word_that_has_no_meaning_is_named_with_those_that_have() {
    for value in ["\"Auto\"", "\"\"", "true"] {
        assert_eq!(
            parse(&format!("[network]\ndatapath = {value}\n")).unwrap_err(),
            format!(
                "/etc/husk/husk.toml:2: network.datapath is {value}; allowed is one of \"auto\", \"vhost\", \"worker\""
            )
        );
    }
}

#[test]
fn ends_of_a_range_are_allowed() {
    for vcpus in [1, 255] {
        let config = parse(&format!("[vm]\nvcpus = {vcpus}\n")).unwrap();
        assert_eq!(config.vm().vcpus(), vcpus);
    }
}

#[test]
fn relative_path_is_refused() {
    assert_eq!(
        parse("[vm]\nkernel = \"vmlinux\"\n").unwrap_err(),
        "/etc/husk/husk.toml:2: vm.kernel is \"vmlinux\"; allowed is an absolute path"
    );
}

#[test]
fn kernel_params_that_would_end_the_command_line_are_refused() {
    for value in [r#""a\nb""#, r#""a\u0000b""#, r#""ü""#, "7"] {
        let err = parse(&format!("[vm]\nkernel_params = {value}\n")).unwrap_err();
        assert!(
            err.contains(":2: vm.kernel_params is ") && err.contains("printable ASCII"),
            "{err}"
        );
        assert!(!err.contains('\n'), "{err}");
    }
    let long = "x".repeat(KERNEL_PARAMS_MAX_LEN + 1);
    let err = parse(&format!("[vm]\nkernel_params = \"{long}\"\n")).unwrap_err();
    assert!(err.len() < 250, "{err}");
}

#[test]
fn what_is_not_understood_is_one_line_with_its_place_and_its_key() {
    for (text, beginning) in [
        // Not TOML.
        ("[vm]\nvcpus = \n", "2: vm.vcpus: "),
        ("[vm]\n\nvcpus\n", "3: vm.vcpus: "),
        ("[vm] # of [all]\nvcpus = two # =\n", "2: vm.vcpus: "),
        ("[vm]\nkernel = \"/k\n\nvcpus = 2\n", "2: vm.kernel: "),
        (
            "[annotations]\nallow = [\n  \"a\" \"b\"\n]\n",
            "3: annotations.allow: ",
        ),
        ("[vm\nvcpus = 1\n", "1: vm: "),
        ("= 3\n", "1: unquoted keys cannot be empty"),
        // Twice.
        ("[vm]\nvcpus = 1\nvcpus = 2\n", "3: vm.vcpus: duplicate key"),
        ("[vm]\n[network]\n[vm]\n", "3: vm: duplicate key"),
        // Of another type.
        (
            "vm = 3\n",
            "1: vm: invalid type: integer `3`, expected a table of keys",
        ),
        ("[[vm]]\nvcpus = 1\n", "1: vm: "),
        // Keys that are nested in the line.
        ("vm.vcpu = 2\n", "1: vm.vcpu: unknown field `vcpu`"),
        ("vm = { vcpu = 2 }\n", "1: vm: unknown field `vcpu`"),
    ] {
        let err = parse(text).unwrap_err();
        let beginning = format!("/etc/husk/husk.toml:{beginning}");
        assert!(err.starts_with(&beginning), "{text:?}: {err}");
        assert!(!err.contains('\n'), "{text:?}: {err}");
    }
}

#[test]
fn missing_named_file_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("husk.toml");
    let err = Config::load(&path).unwrap_err();
    assert_eq!(
        err.to_string(),
        format!("cannot read the configuration {}", path.display())
    );
    assert!(matches!(err, ConfigError::Read { .. }));
}

#[test]
fn missing_default_file_is_the_default() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("husk.toml");
    assert_eq!(Config::load_if_present(&path).unwrap(), Config::default());
}

#[test]
fn default_file_with_an_error_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("husk.toml");
    std::fs::write(&path, "vm = 1\n").unwrap();
    assert!(Config::load_if_present(&path).is_err());
}

#[test]
fn file_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("husk.toml");
    std::fs::write(&path, "[vm]\nmemory_mib = 256\n").unwrap();
    assert_eq!(Config::load(&path).unwrap().vm().memory_mib(), 256);
}

const ALLOWING: &str = "[vm]\nvcpus = 2\nmemory_mib = 600\n[annotations]\nallow = [\"vm.memory_mib\", \"network.datapath\"]\n";

fn annotated(annotations: &[(&str, &str)]) -> Result<Config, ConfigError> {
    Config::from_toml(ALLOWING, "husk.toml")
        .unwrap()
        .with_annotations(annotations.iter().copied())
}

#[test]
fn annotations_that_are_allowed_win_over_the_file() {
    let config = annotated(&[
        ("io.husk.vm.memory_mib", "1024"),
        ("io.husk.network.datapath", "worker"),
        ("io.kubernetes.cri.container-type", "sandbox"),
    ])
    .unwrap();
    assert_eq!(config.vm().memory_mib(), 1024);
    assert_eq!(config.vm().vcpus(), 2);
    assert_eq!(config.network().datapath(), Datapath::Worker);
}

#[test]
fn annotations_that_are_not_allowed_are_refused_with_what_is() {
    for name in ["io.husk.vm.vcpus", "io.husk.vm.kernel", "io.husk.nonsense"] {
        let text = annotated(&[(name, "1")]).unwrap_err().to_string();
        assert!(text.contains(name), "{text}");
        assert!(
            text.ends_with("has vm.memory_mib, network.datapath"),
            "{text}"
        );
    }
    let refused = Config::default().with_annotations([("io.husk.vm.vcpus", "1")]);
    assert!(refused.unwrap_err().to_string().ends_with("has nothing"));
}

#[test]
fn annotations_hold_truths() {
    let config = Config::from_toml(
        "[annotations]\nallow = [\"storage.cache\", \"storage.writeback\"]",
        "husk.toml",
    )
    .unwrap();
    let with = |value| {
        config.clone().with_annotations([
            ("io.husk.storage.cache", "none"),
            ("io.husk.storage.writeback", value),
        ])
    };
    let config = with("true").unwrap();
    let storage = config.storage();
    assert_eq!((storage.cache(), storage.writeback()), (Cache::None, true));
    assert!(!with("false").unwrap().storage().writeback());
    for value in ["yes", "1", ""] {
        let text = with(value).unwrap_err().to_string();
        assert!(text.contains("allowed is true or false"), "{text}");
    }
}

#[test]
fn a_dax_window_is_none_or_of_a_useful_size() {
    let with = |value: &str| {
        let text = format!(
            "[storage]\ndax_window_mib = {value}\n[annotations]\nallow = [\"storage.dax_window_mib\"]"
        );
        Config::from_toml(&text, "husk.toml")
    };
    assert_eq!(Config::default().storage().dax_window_mib(), 0);
    for value in ["0", "16", "16384"] {
        let config = with(value).unwrap();
        assert_eq!(config.storage().dax_window_mib().to_string(), value);
        let none = config.with_annotations([("io.husk.storage.dax_window_mib", "0")]);
        assert_eq!(none.unwrap().storage().dax_window_mib(), 0);
    }
    for value in ["1", "15", "16385", "-2", "\"64\"", "true"] {
        let text = with(value).unwrap_err().to_string();
        assert!(
            text.contains("allowed is 0 for none, or an integer from 16 to 16384"),
            "{text}"
        );
    }
}

#[test]
fn a_server_shares_by_virtio_fs_and_without_a_window() {
    let with = |keys: &str| {
        let text = format!(
            "[annotations]\nallow = [\"storage.sharing\", \"storage.dax_window_mib\"]\n[storage]\n{keys}"
        );
        Config::from_toml(&text, "husk.toml")
    };
    assert_eq!(Config::default().storage().server(), None);
    let config = with("dax_window_mib = 0\nsharing = \"virtio-fs\"\nserver = \"/s\"").unwrap();
    assert_eq!(config.storage().server(), Some(Path::new("/s")));
    for (keys, wrong) in [
        (
            "sharing = \"9p\"\nserver = \"/s\"",
            "4: storage.sharing is \"9p\"; allowed is one of \"virtio-fs\", since storage.server is /s",
        ),
        (
            "server = \"/s\"\ndax_window_mib = 64",
            "5: storage.dax_window_mib is 64; allowed is 0, since storage.server is /s",
        ),
        (
            "server = \"s\"",
            "4: storage.server is \"s\"; allowed is an absolute path",
        ),
    ] {
        let text = with(keys).unwrap_err().to_string();
        assert_eq!(text, format!("husk.toml:{wrong}"));
    }
    for (name, value) in [("sharing", "9p"), ("dax_window_mib", "64")] {
        let name = format!("io.husk.storage.{name}");
        let refused = config.clone().with_annotations([(name.as_str(), value)]);
        let text = refused.unwrap_err().to_string();
        assert!(text.ends_with("since storage.server is /s"), "{text}");
    }
}

#[test]
fn the_disk_of_an_empty_dir_is_none_or_of_a_useful_size() {
    let with = |value: &str| {
        let text = format!("[storage]\nempty_dir_disk_mib = {value}");
        Config::from_toml(&text, "husk.toml")
    };
    assert_eq!(Config::default().storage().empty_dir_disk_mib(), 0);
    for value in ["0", "16", "1048576"] {
        let config = with(value).unwrap();
        assert_eq!(config.storage().empty_dir_disk_mib().to_string(), value);
    }
    for value in ["15", "1048577", "-1", "\"64\""] {
        let text = with(value).unwrap_err().to_string();
        assert!(
            text.contains("allowed is 0 for none, or an integer from 16 to 1048576"),
            "{text}"
        );
    }
}

#[test]
fn nonsense_in_an_annotation_is_named() {
    for value in ["", "many", "-1", "12 GiB", "99999999999999999999"] {
        let text = annotated(&[("io.husk.vm.memory_mib", value)])
            .unwrap_err()
            .to_string();
        assert!(
            text.starts_with("the pod's annotations:") && text.contains("vm.memory_mib is "),
            "{text}"
        );
    }
}

#[test]
fn paths_of_the_host_cannot_be_left_to_pods() {
    for key in ["vm.kernel", "storage.server"] {
        let text = format!("[annotations]\nallow = [\"{key}\"]");
        let text = Config::from_toml(&text, "husk.toml")
            .unwrap_err()
            .to_string();
        assert!(
            text.starts_with("husk.toml:2: annotations.allow is "),
            "{text}"
        );
    }
}
