//! Whether the processor shows hardware virtualization.

use std::fs;

use super::report::Problem;

const CPUINFO: &str = "/proc/cpuinfo";

/// What Linux calls hardware virtualization, and what its vendor does.
const VIRTUALIZATION: [(&str, &str); 2] = [("svm", "AMD-V"), ("vmx", "VT-x")];

const IN_A_VM: &str = "\
This machine is a virtual machine itself, and its hypervisor passes no hardware virtualization on. Use a bare-metal
machine, or one with nested virtualization (many clouds have it as an option of the instance or its type).
That /dev/kvm may exist all the same does not help: it is then a software fallback that cannot run a real kernel.
To see Husk at work here, run ci/demo in its source tree: it brings an emulated machine with KVM along.";

const ON_HARDWARE: &str = "\
Switch it on in the firmware's set-up, where it is called AMD-V, SVM, VT-x or Intel Virtualization Technology.";

pub(super) fn check() -> Result<String, Problem> {
    let cpuinfo = fs::read_to_string(CPUINFO)
        .map_err(|err| Problem::new(format!("cannot read {CPUINFO}: {err}"), "Mount /proc."))?;
    look_at(&cpuinfo)
}

fn look_at(cpuinfo: &str) -> Result<String, Problem> {
    let flags: Vec<&str> = cpuinfo
        .lines()
        .find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == "flags").then(|| value.split_whitespace().collect())
        })
        .unwrap_or_default();
    for (flag, name) in VIRTUALIZATION {
        if flags.contains(&flag) {
            return Ok(format!("has {name} ({flag})"));
        }
    }
    let remedy = if flags.contains(&"hypervisor") {
        IN_A_VM
    } else {
        ON_HARDWARE
    };
    Err(Problem::new(
        "has no hardware virtualization (neither svm nor vmx among its flags)",
        remedy,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amd_and_intel_are_known() {
        let text = "processor\t: 0\nflags\t\t: fpu svm lahf_lm\n";
        assert_eq!(look_at(text).unwrap(), "has AMD-V (svm)");
        let text = "processor\t: 0\nflags\t\t: fpu vmx\nvmx flags\t: vnmi\n";
        assert_eq!(look_at(text).unwrap(), "has VT-x (vmx)");
    }

    #[test]
    fn flag_has_to_be_a_whole_word_of_the_flags() {
        let text = "model name\t: svm\nflags\t\t: fpu svm_lock\nvmx flags\t: vmx\n";
        assert!(look_at(text).is_err());
    }

    #[test]
    fn virtual_machine_is_told_about_nesting_and_the_demo() {
        let problem = look_at("flags\t\t: fpu hypervisor\n").unwrap_err();
        assert!(problem.remedy.contains("nested virtualization"));
        assert!(problem.remedy.contains("ci/demo"));
    }

    #[test]
    fn hardware_is_told_about_its_firmware() {
        let problem = look_at("flags\t\t: fpu\n").unwrap_err();
        assert!(problem.remedy.contains("firmware"));
    }

    #[test]
    fn cpuinfo_without_flags_is_a_problem() {
        assert!(look_at("").is_err());
    }
}
