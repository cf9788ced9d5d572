//! What the guest learns of its processor: the host's features as far as KVM can give them, in a topology of one socket
//! with one thread a core.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

pub(super) type CpuidEntry = kvm_cpuid_entry2;

const FEATURES: u32 = 0x1;
const CACHES: u32 = 0x4;
const PERFORMANCE_MONITORING: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const EXTENDED_FEATURES: u32 = 0x8000_0001;
const EXTENDED_SIZES: u32 = 0x8000_0008;
const AMD_SVM: u32 = 0x8000_000a;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_PERFORMANCE_MONITORING: u32 = 0x8000_0022;
const AMD_TOPOLOGY_V2: u32 = 0x8000_0026;

/// Leaf 1, ECX.
const VMX: u32 = 1 << 5;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: EBX has a number of logical processors.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX.
const CMP_LEGACY: u32 = 1 << 1;
const SVM: u32 = 1 << 2;
const AMD_PERF_COUNTERS: u32 = 1 << 23;

/// Leaf 0xb, ECX: what a level is made of.
const LEVEL_SMT: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// The entries that all vCPUs share, made from what KVM supports.
///
/// Left out, because they only cost boot time and surface in a pod: nested virtualization and performance counters.
pub(super) fn model(supported: &[CpuidEntry], vcpus: u8, deadline_timer: bool) -> Vec<CpuidEntry> {
    let mut entries: Vec<_> = supported
        .iter()
        .filter(|entry| {
            !matches!(
                entry.function,
                PERFORMANCE_MONITORING
                    | TOPOLOGY
                    | TOPOLOGY_V2
                    | AMD_SVM
                    | AMD_PERFORMANCE_MONITORING
                    | AMD_TOPOLOGY_V2
            )
        })
        .copied()
        .collect();
    for entry in &mut entries {
        let id_bits = id_bits(vcpus);
        let most_ids = (1 << id_bits) - 1;
        match entry.function {
            FEATURES => {
                entry.ecx |= HYPERVISOR;
                entry.ecx &= !(VMX | TSC_DEADLINE);
                if deadline_timer {
                    // KVM emulates it, but tells so by a capability (Documentation/virt/kvm/api.rst, KVM_GET_SUPPORTED_CPUID).
                    entry.ecx |= TSC_DEADLINE;
                }
                entry.ebx = entry.ebx & 0x0000_ff00 | u32::from(vcpus) << 16;
                if vcpus > 1 {
                    entry.edx |= HTT;
                } else {
                    entry.edx &= !HTT;
                }
            }
            // A cache of level 3 is shared by all; the others belong to a core.
            CACHES if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 0x7;
                let sharing = if level >= 3 { most_ids } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | most_ids.min(0x3f) << 26;
            }
            AMD_CACHES if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 0x7;
                let sharing = if level >= 3 { u32::from(vcpus) - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14;
            }
            EXTENDED_FEATURES => {
                entry.ecx &= !(SVM | AMD_PERF_COUNTERS);
                if vcpus == 1 {
                    entry.ecx &= !CMP_LEGACY;
                }
            }
            EXTENDED_SIZES => {
                entry.ecx = entry.ecx & 0xffff_0000 | id_bits << 12 | (u32::from(vcpus) - 1);
            }
            _ => {}
        }
    }
    entries
}

/// Bits of physical addresses. Without the leaf it is the 36 that every processor with 64 bits has.
pub(super) fn address_bits(supported: &[CpuidEntry]) -> u32 {
    let sizes = supported
        .iter()
        .find(|entry| entry.function == EXTENDED_SIZES);
    sizes.map_or(36, |entry| entry.eax & 0xff)
}

/// The entries for one vCPU: the shared ones with its APIC id, and the topology leaves.
pub(super) fn for_vcpu(model: &[CpuidEntry], index: u8, vcpus: u8) -> Vec<CpuidEntry> {
    let id = u32::from(index);
    let mut entries = model.to_vec();
    for entry in &mut entries {
        match entry.function {
            FEATURES => entry.ebx |= id << 24,
            AMD_TOPOLOGY => {
                entry.eax = id;
                entry.ebx = id & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    let highest = entries
        .iter()
        .find(|entry| entry.function == 0)
        .map_or(0, |entry| entry.eax);
    if highest >= TOPOLOGY {
        let level = |index, eax, ebx, kind| CpuidEntry {
            function: TOPOLOGY,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx: kind | index,
            edx: id,
            ..Default::default()
        };
        entries.push(level(0, 0, 1, LEVEL_SMT));
        entries.push(level(1, id_bits(vcpus), u32::from(vcpus), LEVEL_CORE));
        entries.push(level(2, 0, 0, 0));
    }
    entries
}

/// How many bits number the vCPUs.
fn id_bits(vcpus: u8) -> u32 {
    u32::from(vcpus).next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> CpuidEntry {
        let [eax, ebx, ecx, edx] = registers;
        CpuidEntry {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn host() -> Vec<CpuidEntry> {
        vec![
            entry(0, 0, [0x1f, 0, 0, 0]),
            entry(FEATURES, 0, [0x306f2, 0x0510_0800, VMX | 1, 0x0780_0000]),
            entry(CACHES, 0, [0x1c00_4121, 0, 0, 0]),
            entry(CACHES, 3, [0x1c03_c163, 0, 0, 0]),
            entry(PERFORMANCE_MONITORING, 0, [0x0730_0403, 0, 0, 0]),
            entry(TOPOLOGY, 0, [1, 2, 0x100, 77]),
            entry(TOPOLOGY_V2, 0, [1, 2, 0x100, 77]),
            entry(EXTENDED_FEATURES, 0, [0, 0, SVM | CMP_LEGACY | 1, 0]),
            entry(EXTENDED_SIZES, 0, [0x3030, 0, 0x4007, 0]),
            entry(AMD_TOPOLOGY, 0, [99, 99, 99, 0]),
        ]
    }

    fn of(entries: &[CpuidEntry], function: u32, index: u32) -> CpuidEntry {
        *entries
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .unwrap()
    }

    #[test]
    fn the_processor_tells_how_many_bits_addresses_have() {
        assert_eq!(address_bits(&host()), 0x30);
        assert_eq!(address_bits(&[]), 36);
    }

    #[test]
    fn the_guest_knows_that_it_is_one_and_cannot_host() {
        let model = model(&host(), 1, true);
        let features = of(&model, FEATURES, 0);
        assert_ne!(features.ecx & HYPERVISOR, 0);
        assert_ne!(features.ecx & TSC_DEADLINE, 0);
        assert_eq!(features.ecx & VMX, 0);
        assert_eq!(of(&model, EXTENDED_FEATURES, 0).ecx, 1);
        assert!(!model.iter().any(|e| e.function == PERFORMANCE_MONITORING));
        assert_eq!(super::model(&host(), 1, false)[1].ecx & TSC_DEADLINE, 0);
    }

    #[test]
    fn one_vcpu_is_one_core() {
        let vcpu = for_vcpu(&model(&host(), 1, true), 0, 1);
        let features = of(&vcpu, FEATURES, 0);
        assert_eq!(features.ebx, 0x0001_0800);
        assert_eq!(features.edx & HTT, 0);
        assert_eq!(of(&vcpu, TOPOLOGY, 1).eax, 0);
        assert_eq!(of(&vcpu, EXTENDED_SIZES, 0).ecx & 0xffff, 0);
    }

    #[test]
    fn each_vcpu_has_its_own_id_in_a_topology_of_cores() {
        let model = model(&host(), 5, true);
        for index in 0..5 {
            let vcpu = for_vcpu(&model, index, 5);
            let id = u32::from(index);
            assert_eq!(of(&vcpu, FEATURES, 0).ebx, id << 24 | 0x0005_0800);
            assert_eq!(of(&vcpu, AMD_TOPOLOGY, 0).eax, id);
            for level in 0..3 {
                assert_eq!(of(&vcpu, TOPOLOGY, level).edx, id);
            }
            assert_eq!(of(&vcpu, TOPOLOGY, 0).ecx, 0x100);
            assert_eq!(of(&vcpu, TOPOLOGY, 1).ecx, 0x201);
            assert_eq!(of(&vcpu, TOPOLOGY, 1).eax, 3, "eight ids");
            assert_eq!(of(&vcpu, TOPOLOGY, 1).ebx, 5);
        }
        assert_eq!(of(&model, EXTENDED_SIZES, 0).ecx, 0x3004);
    }

    #[test]
    fn only_the_last_cache_is_shared() {
        let model = model(&host(), 4, true);
        assert_eq!(of(&model, CACHES, 0).eax >> 14 & 0xfff, 0);
        assert_eq!(of(&model, CACHES, 3).eax >> 14 & 0xfff, 3);
        assert_eq!(of(&model, CACHES, 0).eax >> 26, 3);
        assert_eq!(of(&model, CACHES, 0).eax & 0x3fff, 0x121);
    }

    #[test]
    fn the_most_vcpus_have_a_topology() {
        let model = model(&host(), u8::MAX, true);
        let last = for_vcpu(&model, u8::MAX - 1, u8::MAX);
        assert_eq!(of(&last, TOPOLOGY, 1).eax, 8);
        assert_eq!(of(&last, FEATURES, 0).ebx >> 24, 254);
    }
}
