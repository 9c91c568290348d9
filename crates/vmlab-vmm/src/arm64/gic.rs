//! The interrupt controller, a GICv3: how CPUs are addressed, and what KVM's is set up with.

/// How many CPUs a group has that one write can interrupt (`ICC_SGI1R_EL1.TargetList`).
const GROUP: u32 = 16;

/// The affinity of a CPU, by which the controller and PSCI know it: what KVM gives to the CPU of this number
/// (`reset_mpidr` in arch/arm64/kvm/sys_regs.c). The levels say nothing of [`Topology`]; the device tree does.
///
/// The register has more bits, and is the truth: `KVM_GET_ONE_REG` of `MPIDR_EL1`, masked with
/// [`AFFINITY_MASK`], is this.
///
/// [`Topology`]: crate::topology::Topology
pub const fn affinity(cpu: u32) -> u64 {
    let (in_group, group) = (cpu % GROUP, cpu / GROUP);
    (in_group | (group & 0xff) << 8 | (group >> 8 & 0xff) << 16) as u64
}

/// The bits of `MPIDR_EL1` that are the affinity, all four levels.
pub const AFFINITY_MASK: u64 = 0xff_00ff_ffff;

/// What KVM's controller is set up with. The numbers are of kvm-bindings, which has them on this architecture
/// alone.
#[cfg(target_arch = "aarch64")]
pub mod attributes {
    use kvm_bindings::{
        KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, KVM_DEV_ARM_VGIC_CTRL_INIT,
        KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_NR_IRQS,
        KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION,
    };

    use super::super::layout;

    /// A device attribute, and the value that its address is to point to.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Attribute {
        /// Its group.
        pub group: u32,
        /// Its number in that.
        pub number: u64,
        /// What it is set to; `None` where it takes nothing.
        pub value: Option<Value>,
    }

    /// A value, of the size that KVM reads.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Value {
        /// Of 32 bits.
        U32(u32),
        /// Of 64 bits.
        U64(u64),
    }

    /// Interrupts that are a CPU's own, which are counted with the others.
    const PRIVATE: u32 = 32;

    /// What is set before the first CPU runs, and after the last one was made.
    pub const fn setup(cpus: u32) -> [Attribute; 4] {
        // How many, and where; the number of the region and its flags, in the lowest 16 bits, are 0
        // (Documentation/virt/kvm/devices/arm-vgic-v3.rst).
        let redistributors = (cpus as u64) << 52 | layout::GIC_REDISTRIBUTORS;
        let address = KVM_DEV_ARM_VGIC_GRP_ADDR;
        [
            attribute(
                address,
                KVM_VGIC_V3_ADDR_TYPE_DIST,
                Some(Value::U64(layout::GIC_DISTRIBUTOR)),
            ),
            attribute(
                address,
                KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION,
                Some(Value::U64(redistributors)),
            ),
            attribute(
                KVM_DEV_ARM_VGIC_GRP_NR_IRQS,
                0,
                Some(Value::U32(PRIVATE + layout::spi::COUNT)),
            ),
            attribute(KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT, None),
        ]
    }

    const fn attribute(group: u32, number: u32, value: Option<Value>) -> Attribute {
        Attribute { group, number: number as u64, value }
    }

    /// The features that a CPU is made with, as bits of `kvm_vcpu_init.features[0]`: all but the first wait
    /// until the guest switches them on by PSCI.
    pub const fn cpu_features(cpu: u32) -> u32 {
        let off = if cpu == 0 { 0 } else { 1 << KVM_ARM_VCPU_POWER_OFF };
        1 << KVM_ARM_VCPU_PSCI_0_2 | off
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn affinities_are_in_groups_of_sixteen() {
        let cpus = [0, 1, 15, 16, 17, 255, 256, 511, 4095, 4096];
        let found = cpus.map(affinity);
        assert_eq!(
            found,
            [0, 1, 0xf, 0x100, 0x101, 0xf0f, 0x1000, 0x1f0f, 0xff0f, 0x1_0000],
            "{found:x?}"
        );
        assert!(found.iter().all(|affinity| affinity & !AFFINITY_MASK == 0));
    }
}
