package lab

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrHost says that this machine or this user can't have a lab.
var ErrHost = errors.New("no lab is possible here")

// CheckHost says what is missing for a lab on this machine, all at once.
func CheckHost() error {
	var missing []string
	if os.Geteuid() != 0 {
		missing = append(missing, fmt.Sprintf("root: this is user %d (try sudo)", os.Geteuid()))
	} else {
		for _, c := range []struct {
			bit  uint
			name string
		}{{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN (network namespaces)"}, {unix.CAP_NET_ADMIN, "CAP_NET_ADMIN (interfaces)"}} {
			if !hasCapability(c.bit) {
				missing = append(missing, c.name+": in a container, run it with --privileged")
			}
		}
	}
	if f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0); err != nil {
		missing = append(missing, fmt.Sprintf("/dev/net/tun: %v (modprobe tun; in a container, --device /dev/net/tun)", errors.Unwrap(err)))
	} else {
		_ = f.Close()
	}
	if len(missing) > 0 {
		return fmt.Errorf("%w, missing:\n  %s", ErrHost, strings.Join(missing, "\n  "))
	}
	return nil
}

func hasCapability(bit uint) bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false
	}
	return data[bit/32].Effective&(1<<(bit%32)) != 0
}
