// Package tuntap is how packets come from the kernel's routing and go to it: TUN and TAP
// interfaces in batches, with segmentation and receive offloads.
package tuntap

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Path is the device behind all interfaces.
const Path = "/dev/net/tun"

// OpenFD returns a descriptor of the interface; it says what is missing when
// that fails.
func OpenFD(name string, flags uint16) (fd int, err error) {
	fd, err = unix.Open(Path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return -1, fmt.Errorf("create tun %q: %s is missing: load the module (modprobe tun), or give the container --device %[2]s", name, Path)
	case err != nil:
		return -1, fmt.Errorf("create tun %q: open %s: %w%s", name, Path, err, permissionHint(err))
	}
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		ifr.SetUint16(flags)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		unix.Close(fd)
		hint := permissionHint(err)
		switch {
		case errors.Is(err, unix.EBUSY):
			hint = ": another process uses it; stop that one or choose another name with --tun"
		case errors.Is(err, unix.EINVAL):
			hint = ": an interface of another kind has this name; choose another with --tun"
		}
		return -1, fmt.Errorf("create tun %q: %w%s", name, err, hint)
	}
	return fd, nil
}

func permissionHint(err error) string {
	if errors.Is(err, os.ErrPermission) {
		return ": run as root, or give the capability NET_ADMIN"
	}
	return ""
}

// SetOffloads makes the kernel give and take large TCP packets, and large UDP ones
// where it can (Linux 6.2); udp reports that.
func SetOffloads(fd int) (udp bool, err error) {
	const tcp = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	if unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tcp|unix.TUN_F_USO4|unix.TUN_F_USO6) == nil {
		return true, nil
	}
	return false, unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tcp)
}
