package host

import (
	"os"
	"path/filepath"
	"strings"
)

// Quiet keeps the kernel from chattering into the interface by itself, and
// accepts what comes from networks without a route back.
func (k *Link) Quiet() {
	for path, value := range map[string]string{
		"ipv6/conf/" + k.name + "/addr_gen_mode": "1",
		"ipv6/conf/" + k.name + "/accept_ra":     "0",
		"ipv4/conf/" + k.name + "/rp_filter":     "2",
	} {
		// Read-only in many containers; then it stays as it is and check warns.
		if err := os.WriteFile(filepath.Join(sysctlRoot, path), []byte(value), 0); err != nil {
			k.log.Debug("sysctl not set", "key", path, "error", err)
		}
	}
}

var sysctlRoot = "/proc/sys/net"

// Sysctl reads a setting of the kernel's network; "" if there is no such.
func Sysctl(key string) string {
	b, err := os.ReadFile(filepath.Join(sysctlRoot, key))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// QuietMember keeps routers on the network from configuring this host, and accepts what an
// exit sends, before what goes there takes the same way too.
func (k *Link) QuietMember() {
	for path, value := range map[string]string{"ipv6/conf/" + k.name + "/accept_ra": "0", "ipv4/conf/" + k.name + "/rp_filter": "2"} {
		if err := os.WriteFile(filepath.Join(sysctlRoot, path), []byte(value), 0); err != nil {
			k.log.Debug("sysctl not set", "key", path, "error", err)
		}
	}
}

// Forwards reports whether the kernel, whose settings read returns, forwards packets of
// a family.
func Forwards(read func(key string) string, v6 bool) bool {
	if v6 {
		return read("ipv6/conf/all/forwarding") != "0"
	}
	return read("ipv4/ip_forward") != "0"
}

// ForwardsFrom reports whether the kernel forwards packets of a family that come by an
// interface.
func ForwardsFrom(read func(key string) string, name string, v6 bool) bool {
	if v6 { // the interface's own setting says only whether it is a router's
		return Forwards(read, true) || read("ipv6/conf/"+name+"/force_forwarding") == "1"
	}
	return read("ipv4/conf/"+name+"/forwarding") != "0"
}
