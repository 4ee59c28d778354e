package config

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"ztgate/zerotier/ztnode"
)

// setting is one value of the configuration: a key in the file, a flag and an
// environment variable.
type setting struct {
	key     string
	flag    string // "" = only file and environment
	aliases []string
	usage   string
	def     []string
	list    bool
	boolean bool
	secret  bool
	live    bool // a running gateway can change it; flows that are still allowed go on
	set     func(*Config, []string) error
	get     func(*Config) []string
}

// env returns the name of the setting's environment variable.
func (s *setting) env() string {
	name := s.flag
	if name == "" {
		name = s.key
	}
	return "ZTGATE_" + strings.ToUpper(strings.NewReplacer("-", "_", ".", "_").Replace(name))
}

func scalar(key, flag, usage, def string, set func(*Config, string) error, get func(*Config) string) *setting {
	return &setting{key: key, flag: flag, usage: usage, def: []string{def},
		set: func(c *Config, v []string) error { return set(c, v[0]) },
		get: func(c *Config) []string { return []string{get(c)} }}
}

func text(key, flag, usage, def string, field func(*Config) *string) *setting {
	return scalar(key, flag, usage, def,
		func(c *Config, v string) error { *field(c) = v; return nil },
		func(c *Config) string { return *field(c) })
}

func word(key, flag, usage, def string, words []string, field func(*Config) *string) *setting {
	parse := oneOf(words...)
	return scalar(key, flag, usage, def, func(c *Config, v string) (err error) {
		*field(c), err = parse(v)
		return err
	}, func(c *Config) string { return *field(c) })
}

func number(key, flag, usage string, def, lo, hi int, field func(*Config) *int) *setting {
	return scalar(key, flag, usage, strconv.Itoa(def), func(c *Config, v string) error {
		n, err := strconv.Atoi(v)
		switch {
		case err == nil && n >= lo && n <= hi:
		case def < lo && err == nil && n == def: // stands for a value that is found out
		case def < lo:
			return fmt.Errorf("give a number from %d to %d, or %d", lo, hi, def)
		default:
			return fmt.Errorf("give a number from %d to %d", lo, hi)
		}
		*field(c) = n
		return nil
	}, func(c *Config) string { return strconv.Itoa(*field(c)) })
}

func boolean(key, flag, usage string, def bool, field func(*Config) *bool) *setting {
	s := scalar(key, flag, usage, strconv.FormatBool(def), func(c *Config, v string) (err error) {
		*field(c), err = parseBool(v)
		return err
	}, func(c *Config) string { return strconv.FormatBool(*field(c)) })
	s.boolean = true
	return s
}

func duration(key, flag, usage string, def time.Duration, field func(*Config) *time.Duration) *setting {
	return scalar(key, flag, usage, def.String(), func(c *Config, v string) error {
		d, err := time.ParseDuration(v)
		if err == nil && d == 0 && def == 0 {
			*field(c) = 0 // follows another setting
			return nil
		}
		if err != nil || d < time.Second || d > 7*24*time.Hour {
			return errors.New("give a duration from 1s to 168h, as in 5m")
		}
		*field(c) = d
		return nil
	}, func(c *Config) string { return field(c).String() })
}

func list[T fmt.Stringer](key, flag, usage string, def []string, parse func(string) (T, error), field func(*Config) *[]T) *setting {
	return &setting{key: key, flag: flag, usage: usage, def: def, list: true,
		set: func(c *Config, values []string) error {
			out := make([]T, 0, len(values))
			for _, v := range values {
				t, err := parse(v)
				if err != nil {
					return err
				}
				out = append(out, t)
			}
			*field(c) = out
			return nil
		},
		get: func(c *Config) []string { return texts(*field(c)) }}
}

func (s *setting) alias(names ...string) *setting { s.aliases = names; return s }

func live(s *setting) *setting { s.live = true; return s }

// settings is the one table of all values; flags, environment, file and
// `config show` follow from it.
var settings = slices.Concat([]*setting{
	text("home", "home", "directory of identity and joined networks", DefaultHome, func(c *Config) *string { return &c.Home }),
	text("socket", "socket", "path of the control socket (default "+DefaultSocket+", else inside home)", "", func(c *Config) *string { return &c.Socket }),
	number("port", "port", "UDP port of the overlay, 0 = any free one", DefaultPort, 0, 65535, func(c *Config) *int { return &c.Port }).alias("ZT_PRIMARY_PORT"),
	listenSetting("listen", "listen", "address of the HTTP server for metrics and health, empty = off", DefaultListen, func(c *Config) *string { return &c.Listen }),
	scalar("log.level", "log-level", "what to log: debug, info, warn, error", "info", func(c *Config, v string) error {
		if err := c.LogLevel.UnmarshalText([]byte(v)); err != nil || !slices.Contains([]slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError}, c.LogLevel) {
			return errors.New("use one of debug, info, warn, error")
		}
		return nil
	}, func(c *Config) string { return strings.ToLower(c.LogLevel.String()) }),
	word("log.format", "log-format", "how to log: text or json", "text", []string{"text", formatJSON}, func(c *Config) *string { return &c.LogFormat }),
	nodeSetting(),
	text("planet", "planet", "planet file of your own roots", "", func(c *Config) *string { return &c.Planet }),
	boolean("controller", "controller", "also be a network controller", false, func(c *Config) *bool { return &c.Controller }),
	listenSetting("api.listen", "api-listen", "address of the API of zerotier-one's local service, as in 127.0.0.1:9993; none = off", "", func(c *Config) *string { return &c.API.Listen }),
	list("api.allow_from", "", "", []string{"127.0.0.0/8", "::1/128"}, ParsePrefix, func(c *Config) *[]netip.Prefix { return &c.API.AllowFrom }),
	scalar("webhook.url", "", "", "", setWebhookURL, func(c *Config) string { return c.Webhook.URL }),
	secret(text("webhook.secret", "", "key of the webhook, or file:PATH", "", func(c *Config) *string { return &c.Webhook.Secret })),
	secret(text("identity.secret", "", "secret identity, or file:PATH", "", func(c *Config) *string { return &c.IdentitySecret })).alias("ZEROTIER_IDENTITY_SECRET"),
	text("identity.public", "", "public identity, or file:PATH", "", func(c *Config) *string { return &c.IdentityPublic }).alias("ZEROTIER_IDENTITY_PUBLIC"),
	live(networksSetting()),
	scalar("tcp_relay", "", "", "auto", func(c *Config, v string) error {
		if _, err := netip.ParseAddrPort(v); err != nil && v != "auto" && v != "off" {
			return errors.New("use auto, off or ADDRESS:PORT")
		}
		c.Underlay.TCPRelay = v
		return nil
	}, func(c *Config) string { return c.Underlay.TCPRelay }),
	live(sealedHelloSetting()),
	boolean("low_bandwidth", "", "", false, func(c *Config) *bool { return &c.Underlay.LowBandwidth }),
	boolean("port_mapping", "", "", true, func(c *Config) *bool { return &c.Underlay.PortMapping }).alias("ZT_PORT_MAPPING_ENABLED"),
	text(keyIngress, "ingress", "how VPC packets come in: tun, packet (from the interface itself) or auto", IngressTUN, func(c *Config) *string { return &c.VPC.Ingress }),
	word("vpc.io_uring", "", "", "auto", []string{"auto", "off"}, func(c *Config) *string { return &c.VPC.IOUring }),
	text("vpc.tun", "tun", "name of the TUN interface", DefaultTUN, func(c *Config) *string { return &c.VPC.TUN }),
	list("vpc.sources", "source", "prefix that may send into the overlay, repeatable; none = everybody", nil, ParsePrefix, func(c *Config) *[]netip.Prefix { return &c.VPC.Sources }),
	addressSetting(),
	number("vpc.mtu", "mtu", "MTU of the TUN, in bytes, or at most that of the interface; 0 = the largest of the networks, or the interface's", 0, 1280, 65535, func(c *Config) *int { return &c.VPC.MTU }),
	interfacesSetting(),
	natAddressSetting(),
	boolean("exit", "exit", "carry overlay hosts to the internet, behind nat-address or as this host", false, func(c *Config) *bool { return &c.Exit }),
	live(boolean("nat.masquerade", "masquerade", "hide clients behind the gateway's overlay address", true, func(c *Config) *bool { return &c.NAT.Masquerade })),
	live(boolean("nat.masquerade6", "", "", false, func(c *Config) *bool { return &c.NAT.Masquerade6 })),
	live(list("nat.exempt", "", "", nil, ParsePrefix, func(c *Config) *[]netip.Prefix { return &c.NAT.Exempt })),
	live(list("nat.addresses", "", "", nil, ParsePrefix, func(c *Config) *[]netip.Prefix { return &c.NAT.Addresses })),
	number("nat.max_flows_per_client", "", "", 0, 0, 16<<20, func(c *Config) *int { return &c.NAT.MaxFlowsPerClient }),
	number("nat.max_ports_per_client", "", "", 0, 0, 65535, func(c *Config) *int { return &c.NAT.MaxPortsPerClient }),
	number("nat.max_half_open", "", "", 0, 0, 16<<20, func(c *Config) *int { return &c.NAT.MaxHalfOpen }),
	number("nat.flow_rate_per_client", "", "", 0, 0, 1000000, func(c *Config) *int { return &c.NAT.FlowRatePerClient }),
	word("nat.port_sharing", "", "", "none", []string{"none", "by_destination"}, func(c *Config) *string { return &c.NAT.PortSharing }),
	word("nat.filtering", "", "", "address_and_port", []string{"address_and_port", "endpoint_independent"}, func(c *Config) *string { return &c.NAT.Filtering }),
	boolean("nat.pickup", "", "", true, func(c *Config) *bool { return &c.NAT.Pickup }),
	boolean("nat.window_check", "", "", true, func(c *Config) *bool { return &c.NAT.WindowCheck }),
	duration("nat.port_rest", "", "", 2*time.Minute, func(c *Config) *time.Duration { return &c.NAT.PortRest }),
	number(keyMaxFlows, "max-flows", "bound of the flow table", 262144, 1024, 16<<20, func(c *Config) *int { return &c.NAT.MaxFlows }),
	duration("nat.timeouts.tcp_established", "", "", 120*time.Hour, func(c *Config) *time.Duration { return &c.NAT.Timeouts.TCPEstablished }),
	duration("nat.timeouts.tcp_transitory", "", "", 4*time.Minute, func(c *Config) *time.Duration { return &c.NAT.Timeouts.TCPTransitory }),
	duration("nat.timeouts.tcp_opening", "", "", 0, func(c *Config) *time.Duration { return &c.NAT.Timeouts.TCPOpening }),
	duration("nat.timeouts.tcp_half_closed", "", "", 0, func(c *Config) *time.Duration { return &c.NAT.Timeouts.TCPHalfClosed }),
	duration("nat.timeouts.tcp_closing", "", "", 0, func(c *Config) *time.Duration { return &c.NAT.Timeouts.TCPClosing }),
	duration("nat.timeouts.tcp_reset", "", "", 0, func(c *Config) *time.Duration { return &c.NAT.Timeouts.TCPReset }),
	duration("nat.timeouts.udp_unanswered", "", "", 0, func(c *Config) *time.Duration { return &c.NAT.Timeouts.UDPUnanswered }),
	duration("nat.timeouts.udp", "", "", 5*time.Minute, func(c *Config) *time.Duration { return &c.NAT.Timeouts.UDP }),
	duration("nat.timeouts.icmp", "", "", time.Minute, func(c *Config) *time.Duration { return &c.NAT.Timeouts.ICMP }),
	live(word("policy.default", "policy-default", "what happens to flows that no rule matches: accept, drop, reject", "accept", actions, func(c *Config) *string { return &c.Policy.Default })),
	live(list("policy.allow", "allow", "what the VPC may open, as in tcp:10.0.0.10:443 or icmp:10.0.0.10; repeatable; with it, the policy drops the rest unless policy-default says otherwise", nil, ParseAllow, func(c *Config) *[]Allow { return &c.Policy.Allow })),
	live(list("targets", "target", "overlay service that must answer before the gateway is ready, as in tcp://10.0.0.10:443; repeatable", nil, ParseTarget, func(c *Config) *[]Target { return &c.written.targets })),
}, dnsSettings())

// listenSetting is the address of an HTTP server.
func listenSetting(key, flag, usage, def string, field func(*Config) *string) *setting {
	return scalar(key, flag, usage, def, func(c *Config, v string) error {
		if v != "" {
			_, port, err := net.SplitHostPort(v)
			if _, bad := strconv.ParseUint(port, 10, 16); err != nil || bad != nil {
				return errors.New("give ADDRESS:PORT, as in 127.0.0.1:9002, or nothing to switch it off")
			}
		}
		*field(c) = v
		return nil
	}, func(c *Config) string { return *field(c) })
}

var actions = []string{"accept", "drop", "reject"}

// nodeSetting is the implementation of the node. Its default depends on the build.
func nodeSetting() *setting {
	s := scalar("node", "node", "implementation of the node: go or libzt; default libzt where it is built in", "", func(c *Config, v string) error {
		if v == "" {
			v = DefaultNode()
		}
		c.Node = v
		return CheckNode(v)
	}, func(c *Config) string { return c.Node })
	return s
}

// sealedHelloSetting says which HELLOs of the node are sealed.
func sealedHelloSetting() *setting {
	return scalar("sealed_hello", "", "", ztnode.SealedHelloOff.String(), func(c *Config, v string) error {
		how, ok := ztnode.ParseSealedHello(v)
		if !ok {
			return errors.New("use one of off, auto, always")
		}
		c.Underlay.SealedHello = how
		return nil
	}, func(c *Config) string { return c.Underlay.SealedHello.String() })
}

func secret(s *setting) *setting { s.secret = true; return s }

func networksSetting() *setting {
	s := &setting{key: "networks", flag: "network", list: true,
		usage: "ID of a network to join, repeatable",
		set: func(c *Config, values []string) error {
			out := make([]NetworkConfig, 0, len(values))
			for _, v := range values {
				id, err := parseNetwork(v)
				if err != nil {
					return err
				}
				out = append(out, c.Network(id)) // options of the file stay
			}
			c.Networks = out
			return nil
		},
		get: func(c *Config) []string {
			out := make([]string, len(c.Networks))
			for i, n := range c.Networks {
				out[i] = n.ID.String()
			}
			return out
		}}
	return s.alias("ZEROTIER_JOIN_NETWORKS", "ZEROTIER_ONE_NETWORK_IDS")
}

func interfacesSetting() *setting {
	s := &setting{key: "vpc.interfaces", flag: "interface", list: true,
		usage: "interface that VPC packets come from, repeatable; one with packet as ingress",
		set: func(c *Config, values []string) error {
			for _, v := range values {
				if !validInterface(v) {
					return errors.New("give the name of an interface, as in eth0")
				}
			}
			c.VPC.Interfaces = values
			return nil
		},
		get: func(c *Config) []string { return slices.Clone(c.VPC.Interfaces) }}
	return s.alias("ZEROTIER_ONE_LOCAL_PHYS")
}

// addressSetting is the gateway's own address on the TUN. The default lies in
// shared address space and is never visible outside this host.
func addressSetting() *setting {
	s := list("vpc.address", "address", "own address towards the VPC, repeatable, or none", []string{"100.127.255.1/32"}, parseOwnAddress,
		func(c *Config) *[]netip.Prefix { return &c.VPC.Address })
	set := s.set
	s.set = func(c *Config, v []string) error {
		if len(v) == 1 && v[0] == "none" {
			v = nil
		}
		return set(c, v)
	}
	return s
}

// natHost stands for this host's own address.
const natHost = "host"

// natAddressSetting is how VPC hosts see overlay hosts.
func natAddressSetting() *setting {
	return &setting{key: "vpc.nat_address", flag: "nat-address", list: true,
		usage: "address of the VPC that overlay hosts are masqueraded as there, one of each family; or host, for this host's own",
		set: func(c *Config, values []string) error {
			var out NATAddresses
			for _, v := range values {
				if v == natHost {
					out.Host = true
					continue
				}
				a, err := netip.ParseAddr(v)
				if err != nil || a.Is4In6() || a.Zone() != "" {
					return errors.New("give an address, as in 172.31.0.250, or host")
				}
				if slices.ContainsFunc(out.Addresses, func(o netip.Addr) bool { return o.Is4() == a.Is4() }) {
					return errors.New("there are two addresses of one family: give one")
				}
				out.Addresses = append(out.Addresses, a)
			}
			c.VPC.NAT = out
			return nil
		},
		get: func(c *Config) []string {
			out := texts(c.VPC.NAT.Addresses)
			if c.VPC.NAT.Host {
				out = append(out, natHost)
			}
			return out
		}}
}
