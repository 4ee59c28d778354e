package config

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"ztgate/zerotier/ztnode"
)

// localConf is what a home of zerotier-one says of its node (docs/protocol/02 §8.6).
// It stands behind everything that ztgate itself is told.
type localConf struct {
	Physical map[string]struct {
		Blacklist   bool   `json:"blacklist"`
		TrustedPath uint64 `json:"trustedPathId"`
		MTU         int    `json:"mtu"`
	} `json:"physical"`
	Virtual map[string]struct {
		Try       []string `json:"try"`
		Blacklist []string `json:"blacklist"`
	} `json:"virtual"`
	Settings map[string]json.RawMessage `json:"settings"`
}

// localSettings are the settings of local.conf that have a counterpart here. The
// function writes a value as ours.
var localSettings = map[string]struct {
	key   string
	value func(json.RawMessage) (string, bool)
}{
	"primaryPort":           {"port", plainJSON},
	"portMappingEnabled":    {"port_mapping", plainJSON},
	"lowBandwidthMode":      {"low_bandwidth", plainJSON},
	"encryptedHelloEnabled": {"sealed_hello", switchJSON("always", "off")},
	"tcpFallbackRelay":      {"tcp_relay", slashEndpoint},
	"allowTcpFallbackRelay": {"tcp_relay", onlyFalse("off")},
}

// usualSettings are values of settings without a counterpart that say what ztgate does
// anyway. ZeroTier's images write them into every home.
var usualSettings = map[string]string{
	"softwareUpdate": `"disable"`, "allowManagementFrom": "[]", "multipathMode": "0", "defaultBondingPolicy": `"none"`, "forceTcpRelay": "false",
}

const (
	localConfFile = "local.conf"
	maxLocalConf  = 1 << 20
)

func plainJSON(b json.RawMessage) (string, bool) { return string(b), true }

// switchJSON is for a switch whose positions have words of ours.
func switchJSON(on, off string) func(json.RawMessage) (string, bool) {
	return func(b json.RawMessage) (string, bool) {
		switch string(b) {
		case "true":
			return on, true
		case "false":
			return off, true
		}
		return string(b), true // to be refused by name
	}
}

// slashEndpoint reads ADDRESS/PORT.
func slashEndpoint(b json.RawMessage) (string, bool) {
	var s string
	if json.Unmarshal(b, &s) != nil {
		return string(b), true // to be refused by name
	}
	return strings.Replace(s, "/", ":", 1), true
}

// onlyFalse is for a switch of which only one position says something.
func onlyFalse(word string) func(json.RawMessage) (string, bool) {
	return func(b json.RawMessage) (string, bool) { return word, string(b) == "false" }
}

// localConf takes what a home that was moved from zerotier-one says. What is faulty
// or unknown there is a warning: the home worked with it.
func (l *loader) localConf() {
	l.networkConf()
	path := filepath.Join(l.cfg.Home, localConfFile)
	b, err := readBounded(path, maxLocalConf)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var conf localConf
	if err == nil {
		err = json.Unmarshal(b, &conf)
	}
	if err != nil {
		l.warnf("%s is not used: %s", path, oneLine(err))
		return
	}
	var unknown []string
	for _, name := range slices.Sorted(maps.Keys(conf.Settings)) {
		known, ok := localSettings[name]
		if !ok {
			if usual, has := usualSettings[name]; !has || string(conf.Settings[name]) != usual {
				unknown = append(unknown, name)
			}
			continue
		}
		if v, ok := known.value(conf.Settings[name]); ok {
			l.local(path, name, known.key, v)
		}
	}
	if len(unknown) > 0 {
		l.warnf("%s: these settings have no effect here: %s", path, strings.Join(unknown, ", "))
	}
	l.localPhysical(path, &conf)
	l.localVirtual(path, &conf)
}

func (l *loader) warnf(format string, args ...any) {
	l.cfg.Warnings = append(l.cfg.Warnings, fmt.Sprintf(format, args...))
}

// local sets a value unless something else did.
func (l *loader) local(path, name, key, value string) {
	i := slices.IndexFunc(settings, func(s *setting) bool { return s.key == key })
	if s := settings[i]; l.cfg.origin[key] == "" {
		if err := s.set(l.cfg, []string{value}); err != nil {
			l.warnf("%s: %s %s is not used: %v", path, name, value, err)
			return
		}
		l.cfg.origin[key] = path
	}
}

func (l *loader) localPhysical(path string, conf *localConf) {
	if len(conf.Physical) == 0 || l.cfg.origin["physical"] != "" {
		return
	}
	for _, name := range slices.Sorted(maps.Keys(conf.Physical)) {
		v := conf.Physical[name]
		p, err := netip.ParsePrefix(name)
		if v.MTU = max(v.MTU, 0); v.MTU > 0 { // as zerotier-one takes it
			v.MTU = min(max(v.MTU, minPhysicalMTU), maxPhysicalMTU)
		}
		if err != nil || len(l.cfg.Underlay.Physical) == maxPhysical {
			l.warnf("%s: physical %q is not used: %v", path, name, cmp.Or(err, errors.New("there are too many")))
			continue
		}
		l.cfg.Underlay.Physical = append(l.cfg.Underlay.Physical,
			PhysicalNetwork{Network: p.Masked(), MTU: v.MTU, Blacklist: v.Blacklist, TrustedPath: v.TrustedPath})
	}
	// The first that contains an address counts.
	slices.SortStableFunc(l.cfg.Underlay.Physical, func(a, b PhysicalNetwork) int { return cmp.Compare(b.Network.Bits(), a.Network.Bits()) })
	l.cfg.origin["physical"] = path
}

func (l *loader) localVirtual(path string, conf *localConf) {
	if len(conf.Virtual) == 0 || l.cfg.origin["virtual"] != "" {
		return
	}
	for _, name := range slices.Sorted(maps.Keys(conf.Virtual)) {
		v := conf.Virtual[name]
		address, err := parseMember(name)
		peer := VirtualPeer{Address: address}
		for _, s := range v.Try {
			ep, e := ParseEndpoint(s)
			err, peer.Try = cmp.Or(err, e), append(peer.Try, ep)
		}
		for _, s := range v.Blacklist {
			p, e := netip.ParsePrefix(s)
			err, peer.Blacklist = cmp.Or(err, e), append(peer.Blacklist, p.Masked())
		}
		if err != nil {
			l.warnf("%s: virtual %q is not used: %v", path, name, err)
			continue
		}
		l.cfg.Underlay.Virtual = append(l.cfg.Underlay.Virtual, peer)
	}
	l.cfg.origin["virtual"] = path
}

// networkConf takes what the home says of joined networks (docs/protocol/03 §7.1), unless
// the configuration says otherwise.
func (l *loader) networkConf() {
	files, _ := filepath.Glob(filepath.Join(l.cfg.Home, "networks.d", "*.local.conf")) // the pattern is well-formed
	for _, path := range files {
		b, err := readBounded(path, maxLocalConf)
		id, idErr := ztnode.ParseNetworkID(strings.TrimSuffix(filepath.Base(path), ".local.conf"))
		if err != nil || idErr != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			switch strings.TrimSpace(line) {
			case "allowGlobal=1":
				l.moved(path, id, "allow_global", func(n *NetworkConfig) { n.AllowGlobal = true })
			case "allowDefault=1":
				l.moved(path, id, "allow_default", func(n *NetworkConfig) { n.AllowDefault = true })
			case "allowManaged=0":
				l.warnf("%s: allowManaged=0 has no effect here", path)
			}
		}
	}
}

// moved sets an option of a network unless the configuration has it.
func (l *loader) moved(path string, id ztnode.NetworkID, option string, set func(*NetworkConfig)) {
	key := "networks." + id.String() + "." + option
	if l.cfg.origin[key] != "" {
		return
	}
	l.cfg.origin[key] = path
	if i := slices.IndexFunc(l.cfg.Networks, func(n NetworkConfig) bool { return n.ID == id }); i >= 0 {
		set(&l.cfg.Networks[i])
		return
	}
	if l.cfg.moved == nil {
		l.cfg.moved = map[ztnode.NetworkID]NetworkConfig{}
	}
	n := l.cfg.Network(id)
	set(&n)
	l.cfg.moved[id] = n
}

// readBounded reads a file of at most limit bytes.
func readBounded(path string, limit int64) ([]byte, error) {
	fi, err := os.Stat(path)
	switch {
	case err != nil:
		return nil, err
	case fi.Size() > limit:
		return nil, fmt.Errorf("it has more than %d bytes", limit)
	}
	return os.ReadFile(path)
}
