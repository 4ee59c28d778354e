package host

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Chain is a base chain of nftables that packets on their way through this host meet.
type Chain struct {
	Family  string // as nft has it: ip, ip6, inet, netdev
	Table   string
	Name    string
	Hook    string // ingress, prerouting or forward
	Drops   bool   // by policy what no rule accepts
	Mention bool   // a rule of its table names the interface that was asked for
}

func (c Chain) String() string { return c.Family + " " + c.Table + " " + c.Name }

// Holds reports whether packets of a family pass through the chain.
func (c Chain) Holds(v6 bool) bool { return c.Family != map[bool]string{true: "ip", false: "ip6"}[v6] }

// Firewall is what filters packets on their way through this host.
type Firewall struct {
	Chains []Chain
	Names  []string // of all chains, as "ip filter DOCKER-USER": they tell who made them
	Legacy []string // commands of iptables-legacy that have a filter table, beside nftables
}

// Has reports whether there is a chain of a name.
func (f *Firewall) Has(name string) bool { return slices.Contains(f.Names, name) }

// Messages, attributes and hooks of nftables (linux/netfilter/nf_tables.h) that unix has no
// words for.
const (
	nftSubsystem = unix.NFNL_SUBSYS_NFTABLES << 8
	hookForward  = 2
	inetIngress  = 5
)

var nftFamilies = map[uint8]string{unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6", unix.NFPROTO_INET: "inet", unix.NFPROTO_NETDEV: "netdev"}

// ReadFirewall reads the firewall of the calling thread's network namespace, and whether
// its rules name an interface.
func ReadFirewall(device string) (*Firewall, error) {
	f := &Firewall{}
	for path, command := range map[string]string{"/proc/net/ip_tables_names": "iptables-legacy", "/proc/net/ip6_tables_names": "ip6tables-legacy"} {
		if b, err := os.ReadFile(path); err == nil && slices.Contains(strings.Fields(string(b)), "filter") {
			f.Legacy = append(f.Legacy, command)
		}
	}
	slices.Sort(f.Legacy)
	chains, err := dump(unix.NFT_MSG_GETCHAIN)
	if err != nil {
		return f, fmt.Errorf("read nftables: %w", err)
	}
	rules, err := dump(unix.NFT_MSG_GETRULE)
	if err != nil {
		return f, fmt.Errorf("read nftables: %w", err)
	}
	mention := map[string]bool{}
	for _, r := range rules {
		if bytes.Contains(r.raw, append([]byte(device), 0)) {
			mention[r.family+" "+r.text(unix.NFTA_RULE_TABLE)] = true
		}
	}
	for _, m := range chains {
		c := Chain{Family: m.family, Table: m.text(unix.NFTA_CHAIN_TABLE), Name: m.text(unix.NFTA_CHAIN_NAME)}
		f.Names = append(f.Names, c.String())
		hook, err := attributes(m.attrs[unix.NFTA_CHAIN_HOOK])
		if err != nil || len(hook[unix.NFTA_HOOK_HOOKNUM]) < 4 || m.text(unix.NFTA_CHAIN_TYPE) != "filter" {
			continue // no base chain, or one that drops nothing
		}
		switch n := binary.BigEndian.Uint32(hook[unix.NFTA_HOOK_HOOKNUM]); {
		case c.Family == "netdev" && n == 0, c.Family == "inet" && n == inetIngress:
			c.Hook = "ingress"
		case c.Family == "netdev":
			continue // egress
		case n == 0:
			c.Hook = "prerouting"
		case n == hookForward:
			c.Hook = "forward"
		default:
			continue
		}
		policy := m.attrs[unix.NFTA_CHAIN_POLICY]
		c.Drops = len(policy) == 4 && binary.BigEndian.Uint32(policy) == 0 // NF_DROP
		c.Mention = mention[c.Family+" "+c.Table]
		f.Chains = append(f.Chains, c)
	}
	return f, nil
}

// nftMessage is an answer of nftables.
type nftMessage struct {
	family string
	raw    []byte
	attrs  map[uint16][]byte
}

func (m *nftMessage) text(attr uint16) string { return string(bytes.TrimRight(m.attrs[attr], "\x00")) }

// dump lists all objects of one kind.
func dump(kind int) ([]nftMessage, error) {
	req := nl.NewNetlinkRequest(nftSubsystem|kind, unix.NLM_F_DUMP)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.NFPROTO_UNSPEC, Version: nl.NFNETLINK_V0})
	list, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return nil, err
	}
	var out []nftMessage
	for _, b := range list {
		if len(b) < nl.SizeofNfgenmsg || nftFamilies[b[0]] == "" {
			continue
		}
		attrs, err := attributes(b[nl.SizeofNfgenmsg:])
		if err != nil {
			return nil, err
		}
		out = append(out, nftMessage{nftFamilies[b[0]], b, attrs})
	}
	return out, nil
}

func attributes(b []byte) (map[uint16][]byte, error) {
	list, err := nl.ParseRouteAttr(b)
	out := make(map[uint16][]byte, len(list))
	for _, a := range list {
		out[a.Attr.Type&nl.NLA_TYPE_MASK] = a.Value
	}
	return out, err
}
