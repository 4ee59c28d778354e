package gateway

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/host"
	"ztgate/router/host/tuntap"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode/home"
)

// Examine looks at all that a gateway needs of its host, for when none runs. It changes
// nothing but the lock and missing parts of a home that exists.
func Examine(src config.Sources) control.Diagnosis {
	d := control.Diagnosis{Schema: control.Schema}
	add := func(name string, l control.Link) {
		l.Name = name
		d.Links = append(d.Links, l)
	}
	cfg, err := config.Load(src)
	if err == nil {
		err = plan.Check(cfg)
	}
	if err != nil {
		add("configuration", breaks(strings.Join(strings.Fields(err.Error()), " "), "ztgate config check shows it line by line"))
		for _, name := range []string{"permissions", "host settings", "links", "firewall", "leftovers", "home", "ports", control.LinkGateway} {
			add(name, control.Link{State: control.LinkNotReached})
		}
		return d
	}
	add("configuration", configurationLink(cfg))
	cfg = pickIngress(cfg, slog.New(slog.DiscardHandler))
	if cfg.VPC.Ingress == config.IngressPacket {
		add("permissions", rawPermissionLink())
		add("host settings", copiesLink(cfg.VPC))
		add("links", linkOfChecks(interfaceChecks(cfg.VPC), named("interface_")))
		add("firewall", skips("packet sockets take packets before a firewall does"))
	} else {
		add("permissions", permissionLink())
		add("host settings", linkOfChecks(checkHost(cfg.VPC, host.Sysctl), named("ip_forward", "ipv6_forward", "rp_filter")))
		add("links", linksLink(cfg.VPC))
		add("firewall", firewallLink(cfg.VPC))
	}
	add("leftovers", leftoverLink(cfg.VPC.TUN))
	add("home", homeLink(cfg.Home))
	add("ports", portLink(cfg))
	add(control.LinkGateway, breaks("ztgate isn't running", "run systemctl start ztgate, or ztgate run; its end is in the log"))
	return d
}

func configurationLink(cfg *config.Config) control.Link {
	var list []string
	list = append(list, cfg.Warnings...)
	for _, p := range plan.Make(plan.Input{Config: cfg}).Problems {
		list = append(list, p.String())
	}
	if len(list) > 0 {
		return control.Link{State: control.LinkDegraded, Detail: strings.Join(list, "; ")}
	}
	return holds("valid")
}

// Numbers of capabilities (linux/capability.h).
const (
	capNetAdmin = 12
	capNetRaw   = 13
)

// rawPermissionLink is what packet sockets need.
func rawPermissionLink() control.Link {
	if may, err := hasCapability(capNetRaw); err != nil {
		return skips(err.Error())
	} else if !may {
		return breaks("CAP_NET_RAW is missing, to open packet sockets", "run as root, or with CAP_NET_RAW")
	}
	return holds("CAP_NET_RAW")
}

// copiesLink tells whether the kernel would forward what packet sockets read too.
func copiesLink(vpc config.VPCConfig) control.Link {
	for _, v6 := range []bool{false, true} {
		if name := vpc.Interfaces[0]; (!v6 || sends(vpc, netip.Addr.Is6)) && host.ForwardsFrom(host.Sysctl, name, v6) {
			if may, err := hasCapability(capNetAdmin); err != nil || !may {
				return linkOfChecks([]control.Check{copyCheck(name, v6)}, named(checkCopies))
			}
		}
	}
	return holds("")
}

func permissionLink() control.Link {
	const remedy = "run as root, or with CAP_NET_ADMIN, as the systemd unit does"
	if may, err := hasCapability(capNetAdmin); err != nil {
		return skips(err.Error())
	} else if !may {
		return breaks("CAP_NET_ADMIN is missing, to set up interfaces and routes", remedy)
	}
	f, err := os.OpenFile(tuntap.Path, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return breaks(tuntap.Path+" doesn't exist", "run modprobe tun; in a container, give it --device "+tuntap.Path)
	case err != nil:
		return breaks(err.Error(), remedy)
	}
	_ = f.Close()
	return holds("CAP_NET_ADMIN and " + tuntap.Path)
}

func hasCapability(number int) (bool, error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(status)) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			set, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			return set>>number&1 != 0, err
		}
	}
	return false, errors.New("/proc/self/status has no CapEff")
}

func linksLink(vpc config.VPCConfig) control.Link {
	l := linkOfChecks(checkHost(vpc, host.Sysctl), named("interface_"))
	if l.State != control.LinkOK {
		return l
	}
	if _, err := net.InterfaceByName(vpc.TUN); err == nil {
		return breaks("interface "+vpc.TUN+" exists although ztgate doesn't run: another program has it", "end that program, remove the interface, or choose another with --tun")
	}
	return holds("")
}

// firewallLink tells what the rules say. Whether clients get through a gateway measures.
func firewallLink(vpc config.VPCConfig) control.Link {
	f, err := host.ReadFirewall(vpc.TUN)
	if err != nil {
		return skips(err.Error())
	}
	return linkOfChecks([]control.Check{suspicion("firewall", f, vpc)}, named("firewall"))
}

// leftoverLink tells of what a gateway that was killed left behind. The next start
// takes it over.
func leftoverLink(tun string) control.Link {
	t, err := host.OpenTable()
	if err != nil {
		return skips(err.Error())
	}
	defer t.Close()
	left, err := t.Guards(tun)
	switch {
	case err != nil:
		return skips(err.Error())
	case len(left) == 0:
		return holds("none")
	}
	text := make([]string, len(left))
	for i, p := range left {
		text[i] = p.String()
	}
	return control.Link{State: control.LinkDegraded, Detail: "blackhole routes of a gateway that was killed: packets to " + strings.Join(text, ", ") + " go nowhere",
		Remedy: "start ztgate, which takes them over, or remove them by ip route flush proto 122"}
}

func homeLink(path string) control.Link {
	switch fi, err := os.Stat(path); {
	case errors.Is(err, fs.ErrNotExist):
		return holds(path + " doesn't exist yet: the first start makes it, with a new identity")
	case err != nil:
		return breaks(err.Error(), "run as root")
	case !fi.IsDir():
		return breaks(path+" is no directory", "choose another with --home")
	}
	if err := unix.Access(path, unix.R_OK|unix.W_OK|unix.X_OK); err != nil {
		return breaks(fmt.Sprintf("home %s can't be used: %v", path, err), "run as root, or correct its owner")
	}
	h, err := home.Open(path)
	if err != nil {
		return breaks(err.Error(), "")
	}
	defer h.Close()
	id, err := h.Identity()
	if err == nil {
		_, err = h.Planet(nil)
	}
	switch {
	case err != nil:
		return breaks(err.Error(), "")
	case id == nil:
		return holds(path + " has no identity yet: the first start makes one")
	}
	return holds(path + " of member " + id.Address().String())
}

func portLink(cfg *config.Config) control.Link {
	if cfg.Port != 0 {
		c, err := net.ListenPacket("udp", net.JoinHostPort("", strconv.Itoa(cfg.Port)))
		if err != nil {
			return breaks(fmt.Sprintf("UDP port %d can't be opened: %v", cfg.Port, err), "end the program that has it (ss -ulpn), or choose another with --port")
		}
		_ = c.Close()
	}
	if cfg.Listen != "" {
		l, err := net.Listen("tcp", cfg.Listen)
		if err != nil {
			return breaks(fmt.Sprintf("HTTP server: %v", err), "end the program that has it (ss -tlpn), or choose another with --listen")
		}
		_ = l.Close()
	}
	return holds("free")
}
