"""The public interface that guest and hypervisor share: numbers, structures, flags."""
