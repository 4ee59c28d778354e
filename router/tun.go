package router

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"
)

const tunPath = "/dev/net/tun"

// openTUN creates or attaches to a TUN, in the network namespace of the calling
// thread. It has the offloads the kernel offers.
func openTUN(name string) (Device, error) {
	fd, err := openTunFD(name, unix.IFF_TUN|unix.IFF_NO_PI|unix.IFF_VNET_HDR)
	if err != nil {
		return nil, err
	}
	dev, _, err := tun.CreateUnmonitoredTUNFromFD(fd)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("create tun %q: %w", name, err)
	}
	return dev, nil
}

// openTunFD returns a descriptor of the interface; it says what is missing when
// that fails.
func openTunFD(name string, flags uint16) (fd int, err error) {
	fd, err = unix.Open(tunPath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return -1, fmt.Errorf("create tun %q: %s is missing: load the module (modprobe tun), or give the container --device %[2]s", name, tunPath)
	case err != nil:
		return -1, fmt.Errorf("create tun %q: open %s: %w%s", name, tunPath, err, permissionHint(err))
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
