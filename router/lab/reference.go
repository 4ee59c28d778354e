package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"ztgate/zerotier/ztnode"
)

// Program says which program plays a part of the scenario.
type Program uint8

// Programs.
const (
	Ours      Program = iota // with the node in Go
	Libzt                    // with libzt; not as root, since that is the controller too
	Reference                // the zerotier-one of [Options.ZeroTierOne]; as gateway with kernel forwarding and nftables
)

// referencePort is where zerotier-one has its wire and, on loopback, its local
// API (chapter 04 §13).
const referencePort = 9993

// referenceAPI speaks the local API of a zerotier-one in a namespace.
type referenceAPI struct {
	ns   *Namespace
	home string
	http *http.Client
}

// startReference starts a zerotier-one in a namespace. Its home holds an identity
// already; devices maps networks to interface names, seal says that it seals its HELLOs.
func (t *Topology) startReference(n *Namespace, name, binary, planet string, seal bool, devices map[ztnode.NetworkID]string) (*Process, *referenceAPI, error) {
	home, err := t.Home(name)
	if err != nil {
		return nil, nil, err
	}
	world, err := os.ReadFile(planet)
	if err != nil {
		return nil, nil, err
	}
	var devmap strings.Builder
	for id, dev := range devices {
		fmt.Fprintf(&devmap, "%s=%s\n", id, dev)
	}
	settings := fmt.Sprintf(`{"settings":{"primaryPort":%d,"portMappingEnabled":false,"softwareUpdate":"disable","interfacePrefixBlacklist":[%q],"encryptedHelloEnabled":%v}}`,
		referencePort, officeTUN, seal)
	for file, content := range map[string]string{"planet": string(world), "devicemap": devmap.String(), "local.conf": settings} {
		if err := os.WriteFile(filepath.Join(home, file), []byte(content), 0o600); err != nil {
			return nil, nil, err
		}
	}
	api := &referenceAPI{ns: n, home: home, http: n.HTTPClient()}
	p, err := t.StartPlain(n, name, binary, "-U", fmt.Sprintf("-p%d", referencePort), home)
	return p, api, err
}

// call does one request; out may be nil.
func (a *referenceAPI) call(ctx context.Context, method, path string, in, out any) error {
	token, err := os.ReadFile(filepath.Join(a.home, "authtoken.secret"))
	if err != nil {
		return err // it is written soon after the start
	}
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, fmt.Sprintf("http://127.0.0.1:%d%s", referencePort, path), body)
	if err != nil {
		return err
	}
	req.Header.Set("X-ZT1-Auth", strings.TrimSpace(string(token)))
	resp, err := a.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 8<<20))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, bytes.TrimSpace(b))
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(b, out)
}

// Info returns the node's address when its API answers.
func (a *referenceAPI) address(ctx context.Context) (string, error) {
	var v struct{ Address string }
	err := a.call(ctx, http.MethodGet, "/status", nil, &v)
	return v.Address, err
}

func (a *referenceAPI) join(ctx context.Context, id ztnode.NetworkID) error {
	return a.call(ctx, http.MethodPost, "/network/"+id.String(), map[string]any{"allowManaged": true, "allowGlobal": true}, nil)
}

func (a *referenceAPI) leave(ctx context.Context, id ztnode.NetworkID) error {
	return a.call(ctx, http.MethodDelete, "/network/"+id.String(), nil, nil)
}

// network returns how the node sees a network (chapter 04 §15.4).
func (a *referenceAPI) network(ctx context.Context, id ztnode.NetworkID) (NetworkState, error) {
	var v struct {
		Status            string
		PortDeviceName    string
		AssignedAddresses []netip.Prefix
	}
	err := a.call(ctx, http.MethodGet, "/network/"+id.String(), nil, &v)
	return NetworkState{v.Status, v.PortDeviceName, v.AssignedAddresses}, err
}

// endpoints returns where the node reaches another directly, the preferred one
// first.
func (a *referenceAPI) endpoints(ctx context.Context, address string) ([]netip.AddrPort, error) {
	var p struct {
		Paths []struct {
			Address                    string // "ip/port"
			Active, Expired, Preferred bool
		}
		Tunneled bool
	}
	if err := a.call(ctx, http.MethodGet, "/peer/"+address, nil, &p); err != nil || p.Tunneled {
		return nil, err
	}
	var out []netip.AddrPort
	for _, path := range p.Paths {
		host, port, _ := strings.Cut(path.Address, "/")
		ep, err := netip.ParseAddrPort(net.JoinHostPort(host, port))
		if err != nil {
			return nil, fmt.Errorf("path to %s: %w", address, err)
		}
		switch {
		case !path.Active || path.Expired:
		case path.Preferred:
			out = slices.Insert(out, 0, ep)
		default:
			out = append(out, ep)
		}
	}
	return out, nil
}

// link returns DIRECT if the node has a direct path to another, and where.
func (a *referenceAPI) link(ctx context.Context, address string) (link, endpoint string, err error) {
	list, err := a.endpoints(ctx, address)
	if err != nil {
		return "", "", err
	}
	if len(list) == 0 {
		return "RELAY", "", nil
	}
	return "DIRECT", list[0].String(), nil
}

// createNetwork makes a network on the node's controller.
func (a *referenceAPI) createNetwork(ctx context.Context, patch any) (json.RawMessage, error) {
	address, err := a.address(ctx)
	if err != nil {
		return nil, err
	}
	var rec json.RawMessage
	err = a.call(ctx, http.MethodPost, "/controller/network/"+address+"______", patch, &rec)
	return rec, err
}

func (a *referenceAPI) setNetwork(ctx context.Context, id ztnode.NetworkID, patch any) error {
	return a.call(ctx, http.MethodPost, "/controller/network/"+id.String(), patch, nil)
}

func (a *referenceAPI) setMember(ctx context.Context, id ztnode.NetworkID, address string, patch any) error {
	return a.call(ctx, http.MethodPost, fmt.Sprintf("/controller/network/%s/member/%s", id, address), patch, nil)
}

// masquerade sets up what a gateway made by hand has: kernel forwarding and one
// nftables rule with counters.
func masquerade(ctx context.Context, n *Namespace, device string) error {
	rules := fmt.Sprintf(`table ip nat {
	chain postrouting {
		type nat hook postrouting priority srcnat;
		oifname %q counter masquerade
	}
}
`, device)
	out, err := n.Input(ctx, rules, "nft", "-f", "-")
	if err != nil {
		return fmt.Errorf("set up nftables in %q: %w: %s", n.Name, err, bytes.TrimSpace(out))
	}
	return nil
}

// handMade makes a zerotier-one a gateway between its networks and a VPC, whatever
// their interfaces will be called, with ports that are forwarded to the host behind it.
func handMade(ctx context.Context, n *Namespace, ports []uint16) error {
	if err := masquerade(ctx, n, "zt*"); err != nil {
		return err
	}
	rules := "table ip nat {\n\tchain prerouting {\n\t\ttype nat hook prerouting priority dstnat;\n"
	for _, p := range ports {
		rules += fmt.Sprintf("\t\tiifname \"zt*\" tcp dport %d dnat to %s\n", p, VPCHost)
	}
	out, err := n.Input(ctx, rules+"\t}\n}\n", "nft", "-f", "-")
	if err != nil {
		return fmt.Errorf("forward ports in %q: %w: %s", n.Name, err, bytes.TrimSpace(out))
	}
	return nil
}

// hasAddress waits for an address on an interface of the namespace.
func (n *Namespace) hasAddress(device string, a netip.Addr) error {
	l, err := n.nl.LinkByName(device)
	if err != nil {
		return fmt.Errorf("find interface %q in %q: %w", device, n.Name, err)
	}
	list, err := n.nl.AddrList(l, 0)
	if err != nil {
		return fmt.Errorf("list addresses of %q in %q: %w", device, n.Name, err)
	}
	for _, have := range list {
		if b, ok := netip.AddrFromSlice(have.IP); ok && b.Unmap() == a {
			return nil
		}
	}
	return fmt.Errorf("interface %q in %q has no address %s yet", device, n.Name, a)
}

var (
	errNoReference = errors.New("a part of the scenario is to be zerotier-one, but its path isn't given")
	errLibztRoot   = errors.New("the root is the controller too, which libzt can't be")
)
