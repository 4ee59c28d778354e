package controller

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"

	"ztgate/zerotier/controller/rulelang"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl2"
)

const (
	maxName           = 127
	maxDNSDomain      = 127
	maxCapRules       = 64
	maxPools          = 1024
	maxAuthTokens     = 1024
	defaultMulticast  = 32
	maxMulticastLimit = 65535
	defaultTimeDelta  = 1800000 // ms
	minTimeDelta      = 300000
	maxTimeDelta      = 7200000
)

// Network is a network record (chapter 04 §7). Start from [DefaultNetwork]: the
// zero value is a public network without broadcast. Its JSON form is that of the
// reference; keys of a stored record that are not listed here are kept.
type Network struct {
	ID vl2.NetworkID `json:"-"` // "id" and "nwid"

	Name              string       `json:"name"`    // at most 127 bytes
	Private           bool         `json:"private"` // members need authorisation
	CreationTime      int64        `json:"creationTime"`
	Revision          uint64       `json:"revision"`
	EnableBroadcast   bool         `json:"enableBroadcast"`
	MulticastLimit    int          `json:"multicastLimit"` // 0 switches multicast off
	MTU               int          `json:"mtu"`
	V4AssignMode      V4AssignMode `json:"v4AssignMode"`
	V6AssignMode      V6AssignMode `json:"v6AssignMode"`
	Routes            []Route      `json:"routes"`
	IPAssignmentPools []Pool       `json:"ipAssignmentPools"`
	Rules             []vl2.Rule   `json:"rules"` // nil: accept everything; empty: drop everything
	Capabilities      []Capability `json:"capabilities"`
	Tags              []Tag        `json:"tags"`
	AuthTokens        AuthTokens   `json:"authTokens"`
	DNS               DNS          `json:"dns"`
	RemoteTraceTarget string       `json:"remoteTraceTarget"` // 10 hexadecimal digits or ""
	RemoteTraceLevel  uint64       `json:"remoteTraceLevel"`
	RulesSource       string       `json:"rulesSource"`
	SSOEnabled        bool         `json:"ssoEnabled"`

	// CertificateTimeoutWindowSize is by how much the certificates of two members
	// may differ in age, ms; 0 = 30 minutes. It is clamped to 5 minutes to 2 hours.
	CertificateTimeoutWindowSize int64 `json:"certificateTimeoutWindowSize,omitempty"`

	extra map[string]json.RawMessage
}

// V4AssignMode says how members get IPv4 addresses.
type V4AssignMode struct {
	ZT bool `json:"zt"` // from the pools
}

// V6AssignMode says how members get IPv6 addresses.
type V6AssignMode struct {
	RFC4193  bool `json:"rfc4193"`
	SixPlane bool `json:"6plane"`
	ZT       bool `json:"zt"` // from the pools
}

// Route is a managed route. Host bits of the target are kept.
type Route struct {
	Target netip.Prefix `json:"target"`
	Via    netip.Addr   `json:"via"` // invalid = on the network itself
}

// Pool is a range from which addresses are given out.
type Pool struct {
	Start netip.Addr `json:"ipRangeStart"`
	End   netip.Addr `json:"ipRangeEnd"`
}

// Capability is a set of rules that members can be given.
type Capability struct {
	ID      uint32     `json:"id"`
	Default bool       `json:"default"` // given at the first authorisation
	Rules   []vl2.Rule `json:"rules"`
}

// Tag is a tag number that members can have a value for.
type Tag struct {
	ID      uint32  `json:"id"`
	Default *uint32 `json:"default"` // for members without a value; nil = none
}

// AuthTokens are join tokens and when they expire, ms since 1970, 0 = never.
type AuthTokens map[string]int64

// DNS are the name servers of a network.
type DNS struct {
	Domain  string       `json:"domain"`
	Servers []netip.Addr `json:"servers"`
}

// DefaultNetwork returns a record with the reference's defaults: private,
// broadcast allowed, one rule that accepts everything, no routes and no pools.
func DefaultNetwork() Network {
	return Network{
		Private: true, EnableBroadcast: true, MulticastLimit: defaultMulticast, MTU: vl2.DefaultMTU,
		Rules: []vl2.Rule{{Type: vl2.ActionAccept}},
	}
}

// timeDelta is the time window of the network's credentials, ms.
func (n *Network) timeDelta() int64 {
	if n.CertificateTimeoutWindowSize == 0 {
		return defaultTimeDelta
	}
	return min(max(n.CertificateTimeoutWindowSize, minTimeDelta), maxTimeDelta)
}

func (n Network) clone() Network {
	n.Routes = slices.Clone(n.Routes)
	n.IPAssignmentPools = slices.Clone(n.IPAssignmentPools)
	n.Rules = cloneRules(n.Rules)
	n.Capabilities = slices.Clone(n.Capabilities)
	for i := range n.Capabilities {
		n.Capabilities[i].Rules = cloneRules(n.Capabilities[i].Rules)
	}
	n.Tags = slices.Clone(n.Tags)
	for i, t := range n.Tags {
		if t.Default != nil {
			v := *t.Default
			n.Tags[i].Default = &v
		}
	}
	n.AuthTokens = maps.Clone(n.AuthTokens)
	n.DNS.Servers = slices.Clone(n.DNS.Servers)
	n.extra = maps.Clone(n.extra)
	return n
}

func cloneRules(rules []vl2.Rule) []vl2.Rule {
	rules = slices.Clone(rules)
	for i := range rules {
		rules[i].Field = slices.Clone(rules[i].Field)
	}
	return rules
}

// normalize brings a record that the administrator changed into the stored form,
// or says why it can't be used.
func (n *Network) normalize() error {
	if n.MTU == 0 {
		n.MTU = vl2.DefaultMTU
	}
	n.MTU = min(max(n.MTU, vl2.MinMTU), vl2.MaxMTU)
	if n.Rules == nil {
		n.Rules = []vl2.Rule{{Type: vl2.ActionAccept}}
	}
	switch {
	case len(n.Name) > maxName:
		return fmt.Errorf("name: longer than %d bytes", maxName)
	case n.MulticastLimit < 0 || n.MulticastLimit > maxMulticastLimit:
		return fmt.Errorf("multicastLimit: %d is outside 0 to %d", n.MulticastLimit, maxMulticastLimit)
	case len(n.Routes) > vl2.MaxRoutes:
		return fmt.Errorf("routes: more than %d", vl2.MaxRoutes)
	case len(n.Rules) > vl2.MaxRules:
		return fmt.Errorf("rules: more than %d", vl2.MaxRules)
	case len(n.Capabilities) > vl2.MaxCapabilities:
		return fmt.Errorf("capabilities: more than %d", vl2.MaxCapabilities)
	case len(n.Tags) > vl2.MaxTags:
		return fmt.Errorf("tags: more than %d", vl2.MaxTags)
	case len(n.IPAssignmentPools) > maxPools:
		return fmt.Errorf("ipAssignmentPools: more than %d", maxPools)
	case len(n.AuthTokens) > maxAuthTokens:
		return fmt.Errorf("authTokens: more than %d", maxAuthTokens)
	case len(n.DNS.Domain) > maxDNSDomain || strings.ContainsRune(n.DNS.Domain, 0):
		return fmt.Errorf("dns: domain %q is too long or has a zero byte", n.DNS.Domain)
	case len(n.DNS.Servers) > vl2.MaxDNSServers:
		return fmt.Errorf("dns: more than %d servers", vl2.MaxDNSServers)
	case n.CertificateTimeoutWindowSize < 0:
		return errors.New("certificateTimeoutWindowSize: negative")
	}
	for _, r := range n.Routes {
		switch {
		case !r.Target.IsValid() || r.Target.Addr().Is4In6() || r.Target.Addr().Zone() != "":
			return errors.New("routes: a target is no address with a prefix length")
		case r.Via.IsValid() && (r.Via.Is4() != r.Target.Addr().Is4() || r.Via.Is4In6() || r.Via.Zone() != ""):
			return fmt.Errorf("routes: %s is no gateway for %s", r.Via, r.Target)
		}
	}
	for _, p := range n.IPAssignmentPools {
		if !usableAddr(p.Start) || !usableAddr(p.End) || p.Start.Is4() != p.End.Is4() || p.End.Less(p.Start) {
			return fmt.Errorf("ipAssignmentPools: %s to %s is no range", p.Start, p.End)
		}
	}
	for _, a := range n.DNS.Servers {
		if !usableAddr(a) {
			return fmt.Errorf("dns: server %s", a)
		}
	}
	for token, expiry := range n.AuthTokens {
		if token == "" || expiry < 0 {
			return errors.New("authTokens: an empty token or a negative time")
		}
	}
	if err := checkTrace(n.RemoteTraceTarget); err != nil {
		return err
	}
	n.Capabilities = uniqueByID(n.Capabilities, func(c Capability) uint32 { return c.ID })
	n.Tags = uniqueByID(n.Tags, func(t Tag) uint32 { return t.ID })
	for _, c := range n.Capabilities {
		if len(c.Rules) > maxCapRules {
			return fmt.Errorf("capabilities: %d has more than %d rules", c.ID, maxCapRules)
		}
	}
	return nil
}

func usableAddr(a netip.Addr) bool {
	return a.IsValid() && !a.IsUnspecified() && !a.Is4In6() && a.Zone() == ""
}

func checkTrace(target string) error {
	if target == "" {
		return nil
	}
	if _, err := identity.ParseAddress(target); err != nil {
		return fmt.Errorf("remoteTraceTarget: %w", err)
	}
	return nil
}

// uniqueByID sorts by ID; of several with one ID the last counts.
func uniqueByID[T any](list []T, id func(T) uint32) []T {
	slices.Reverse(list)
	slices.SortStableFunc(list, func(a, b T) int { return cmp.Compare(id(a), id(b)) })
	return slices.CompactFunc(list, func(a, b T) bool { return id(a) == id(b) })
}

type plainNetwork Network

// MarshalJSON writes the stored form.
func (n Network) MarshalJSON() ([]byte, error) {
	forced := map[string]any{"id": n.ID.String(), "nwid": n.ID.String(), "objtype": "network"}
	for _, key := range []string{"clientId", "authorizationEndpoint"} { // of single sign-on, unused
		if n.extra[key] == nil {
			forced[key] = ""
		}
	}
	return marshalRecord(plainNetwork(n.withoutNil()), n.extra, "remoteTraceTarget", forced)
}

// withoutNil makes empty lists [] instead of null, as others expect.
func (n Network) withoutNil() Network {
	n.Routes, n.IPAssignmentPools = orEmpty(n.Routes), orEmpty(n.IPAssignmentPools)
	n.Rules, n.Tags = orEmpty(n.Rules), orEmpty(n.Tags)
	n.Capabilities = orEmpty(slices.Clone(n.Capabilities))
	for i := range n.Capabilities {
		n.Capabilities[i].Rules = orEmpty(n.Capabilities[i].Rules)
	}
	n.DNS.Servers = orEmpty(n.DNS.Servers)
	if n.AuthTokens == nil {
		n.AuthTokens = AuthTokens{}
	}
	return n
}

func orEmpty[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

// UnmarshalJSON reads the stored form; absent keys get their defaults.
func (n *Network) UnmarshalJSON(b []byte) error {
	out := DefaultNetwork()
	out.Rules = nil
	if err := json.Unmarshal(b, (*plainNetwork)(&out)); err != nil {
		return fmt.Errorf("decode network: %w", err)
	}
	extra, ids, err := splitRecord(b, "id", "nwid")
	if err != nil {
		return fmt.Errorf("decode network: %w", err)
	}
	if out.ID, err = vl2.ParseNetworkID(ids); err != nil {
		return fmt.Errorf("decode network: %w", err)
	}
	switch {
	case extra["rules"] == nil:
		out.Rules = DefaultNetwork().Rules
	case out.Rules == nil:
		out.Rules = []vl2.Rule{} // null
	}
	out.extra = extra
	*n = out
	return nil
}

// Patch changes the keys of a JSON object, each wholly; the rest stays. Keys that
// are not the administrator's are ignored (chapter 04 §12).
//
// rulesSource without rules is compiled (see package rulelang): it replaces rules,
// capabilities and tags, and the keys capabilitiesByName and tagsByName say what its
// names stand for.
func (n *Network) Patch(b []byte) error {
	body, err := patchKeys(b, "name", "private", "enableBroadcast", "multicastLimit", "mtu", "v4AssignMode", "v6AssignMode",
		"routes", "ipAssignmentPools", "rules", "capabilities", "tags", "authTokens", "dns", "remoteTraceTarget",
		"remoteTraceLevel", "rulesSource", "certificateTimeoutWindowSize", "ssoEnabled")
	if err != nil {
		return err
	}
	for key := range body {
		switch key { // decoding would merge with the elements that are there
		case "routes":
			n.Routes = nil
		case "ipAssignmentPools":
			n.IPAssignmentPools = nil
		case "rules":
			n.Rules = []vl2.Rule{}
		case "capabilities":
			n.Capabilities = nil
		case "tags":
			n.Tags = nil
		case "remoteTraceTarget":
			n.RemoteTraceTarget = ""
		}
	}
	if err := decodeKeys(body, (*plainNetwork)(n)); err != nil {
		return err
	}
	if body["rulesSource"] != nil && body["rules"] == nil && strings.TrimSpace(n.RulesSource) != "" {
		return n.compile()
	}
	return nil
}

// compile makes rules, capabilities and tags of the source.
func (n *Network) compile() error {
	p, err := rulelang.Compile(n.RulesSource)
	if err != nil {
		return fmt.Errorf("rulesSource: %w", err)
	}
	type named struct {
		ID      uint32            `json:"id"`
		Default any               `json:"default"`
		Enums   map[string]uint32 `json:"enums,omitempty"`
		Flags   map[string]uint32 `json:"flags,omitempty"`
	}
	n.Rules, n.Capabilities, n.Tags = append([]vl2.Rule{}, p.Rules...), nil, nil
	caps, tags := map[string]named{}, map[string]named{}
	for _, c := range p.Capabilities {
		n.Capabilities = append(n.Capabilities, Capability{ID: c.ID, Default: c.Default, Rules: c.Rules})
		caps[c.Name] = named{ID: c.ID, Default: c.Default}
	}
	for _, t := range p.Tags {
		n.Tags = append(n.Tags, Tag{ID: t.ID, Default: t.Default})
		tags[t.Name] = named{ID: t.ID, Default: t.Default, Enums: t.Enums, Flags: t.Flags}
	}
	if n.extra == nil {
		n.extra = map[string]json.RawMessage{}
	}
	for key, v := range map[string]any{"capabilitiesByName": caps, "tagsByName": tags} {
		if n.extra[key], err = json.Marshal(v); err != nil {
			return fmt.Errorf("rulesSource: %w", err)
		}
	}
	return nil
}

// UnmarshalJSON also takes the text "zt".
func (m *V4AssignMode) UnmarshalJSON(b []byte) error {
	words, err := modeWords(b)
	*m = V4AssignMode{ZT: words["zt"]}
	return err
}

// UnmarshalJSON also takes words separated by commas.
func (m *V6AssignMode) UnmarshalJSON(b []byte) error {
	words, err := modeWords(b)
	*m = V6AssignMode{RFC4193: words["rfc4193"], SixPlane: words["6plane"], ZT: words["zt"]}
	return err
}

func modeWords(b []byte) (map[string]bool, error) {
	words := map[string]bool{}
	var text string
	if json.Unmarshal(b, &text) == nil {
		for _, w := range strings.Split(text, ",") {
			words[strings.TrimSpace(w)] = true
		}
		return words, nil
	}
	values := map[string]json.RawMessage{}
	if err := json.Unmarshal(b, &values); err != nil {
		return nil, err
	}
	for w, v := range values { // front ends send them as text too
		v, ok := lenientBool(v)
		if !ok {
			continue
		}
		on := false
		if err := json.Unmarshal(v, &on); err != nil {
			return nil, fmt.Errorf("%q: %w", w, err)
		}
		words[w] = on
	}
	return words, nil
}

// MarshalJSON writes null for no gateway.
func (r Route) MarshalJSON() ([]byte, error) {
	var via *netip.Addr
	if r.Via.IsValid() {
		via = &r.Via
	}
	return json.Marshal(struct {
		Target netip.Prefix `json:"target"`
		Via    *netip.Addr  `json:"via"`
	}{r.Target, via})
}

// UnmarshalJSON also takes the [null] that the reference writes for no tokens.
func (t *AuthTokens) UnmarshalJSON(b []byte) error {
	*t = nil
	if isArray(b) {
		return nil
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		return err
	}
	for token, v := range m {
		if f, ok := v.(float64); ok && f >= 0 && f < math.MaxInt64 {
			if *t == nil {
				*t = AuthTokens{}
			}
			(*t)[token] = int64(f)
		}
	}
	return nil
}

// UnmarshalJSON also takes the [] that the reference writes for no servers.
func (d *DNS) UnmarshalJSON(b []byte) error {
	*d = DNS{}
	if isArray(b) {
		return nil
	}
	type plain DNS
	return json.Unmarshal(b, (*plain)(d))
}
