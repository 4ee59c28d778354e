package controller

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"ztgate/internal/disk"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl2"
)

// Archive has the records of a controller that doesn't run, ours or the reference's
// (chapter 04 §10).
type Archive struct {
	Networks []Network // ascending ID
	Members  []Member  // ascending network, address
}

// ReadArchive reads the records in a controller's directory and changes nothing there.
// Its error names every record that can't be read. A directory without records is an
// empty archive.
func ReadArchive(on disk.FS, dir string) (a Archive, err error) {
	s := store{disk.Or(on), dir}
	var errs []error
	names, err := s.list(s.networks(), 16)
	if err != nil {
		return a, err
	}
	for _, name := range names {
		id, err := vl2.ParseNetworkID(name)
		if err != nil {
			continue
		}
		var n Network
		if err := s.readRecord(s.networkPath(id), &n); err != nil {
			errs = append(errs, err)
			continue
		} else if n.ID != id {
			errs = append(errs, fmt.Errorf("read %s: record is of network %s", s.networkPath(id), n.ID))
			continue
		}
		a.Networks = append(a.Networks, n)
		members, err := s.list(s.memberDir(id), 10)
		errs = append(errs, err)
		for _, name := range members {
			address, err := identity.ParseAddress(name)
			if err != nil {
				continue
			}
			var m Member
			if err := s.readRecord(s.memberPath(id, address), &m); err != nil {
				errs = append(errs, err)
			} else if m.Address != address {
				errs = append(errs, fmt.Errorf("read %s: record is of member %s", s.memberPath(id, address), m.Address))
			}
			m.Network = id
			a.Members = append(a.Members, m)
		}
	}
	return a, errors.Join(errs...)
}

// list returns the names of the records in a directory, ascending.
func (s store) list(dir string, length int) (names []string, err error) {
	entries, err := s.disk.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read controller directory: %w", err)
	}
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ".json"); ok && len(name) == length {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// Write writes the records into a directory that has none, in the reference's form.
func (a Archive) Write(on disk.FS, dir string) error {
	s := store{disk.Or(on), dir}
	if err := s.init(); err != nil {
		return err
	}
	for i := range a.Networks {
		if err := s.addNetwork(&a.Networks[i]); err != nil {
			return err
		}
	}
	for i := range a.Members {
		if err := s.writeMember(&a.Members[i]); err != nil {
			return err
		}
	}
	return nil
}

// Of returns the networks of one controller with their members, and the others.
func (a Archive) Of(controller identity.Address) (own Archive, others []vl2.NetworkID) {
	for _, n := range a.Networks {
		if n.ID.Controller() == controller {
			own.Networks = append(own.Networks, n)
		} else {
			others = append(others, n.ID)
		}
	}
	for _, m := range a.Members {
		if m.Network.Controller() == controller {
			own.Members = append(own.Members, m)
		}
	}
	return own, others
}

// LastTimestamp returns the latest time stamp that certificates of a controller of ours
// may have, ms since 1970; 0 if that isn't known.
func (a Archive) LastTimestamp(on disk.FS, dir string) (last int64) {
	s := store{disk.Or(on), dir}
	for _, n := range a.Networks {
		var rec stateRecord
		if s.readRecord(s.statePath(n.ID), &rec) == nil {
			last = max(last, rec.Timestamp)
		}
	}
	return last
}

// Fit brings records of the reference into the form that this controller would have
// stored, and says, a line each, what has no counterpart here. The reference may have
// stored what it never uses; that goes. An error says that a record can't be used at
// all.
func (a *Archive) Fit() (notes []string, err error) {
	var errs []error
	networks := map[vl2.NetworkID]*Network{}
	for i := range a.Networks {
		n := &a.Networks[i]
		note := func(format string, args ...any) {
			notes = append(notes, fmt.Sprintf("network %s: ", n.ID)+fmt.Sprintf(format, args...))
		}
		n.fit(note)
		if err := n.normalize(); err != nil {
			errs = append(errs, fmt.Errorf("network %s: %w", n.ID, err))
		}
		networks[n.ID] = n
	}
	owners := map[vl2.NetworkID]map[netip.Addr]identity.Address{}
	for i := range a.Members {
		m := &a.Members[i]
		note := func(format string, args ...any) {
			notes = append(notes, fmt.Sprintf("member %s of %s: ", m.Address, m.Network)+fmt.Sprintf(format, args...))
		}
		m.fit(note)
		old := *m
		if err := m.normalize(&old); err != nil {
			errs = append(errs, fmt.Errorf("member %s of %s: %w", m.Address, m.Network, err))
		}
		if owners[m.Network] == nil {
			owners[m.Network] = map[netip.Addr]identity.Address{}
		}
		for _, a := range m.IPAssignments {
			if other, taken := owners[m.Network][a]; taken {
				note("%s is also the address of %s: give one of them another", a, other)
			}
			owners[m.Network][a] = m.Address
			if _, ok := networks[m.Network].inRoute(a); !ok {
				note("%s is in no route of the network and isn't used until one has it", a)
			}
		}
	}
	return notes, errors.Join(errs...)
}

// fit drops what no controller uses, and names what has no effect here.
func (n *Network) fit(note func(string, ...any)) {
	unusable := func(p Pool) bool {
		bad := !usableAddr(p.Start) || !usableAddr(p.End) || p.Start.Is4() != p.End.Is4() || p.End.Less(p.Start)
		if bad {
			note("pool %s to %s is left out: it is no range", p.Start, p.End)
		}
		return bad
	}
	n.IPAssignmentPools = slices.DeleteFunc(n.IPAssignmentPools, unusable)
	cut(&n.Routes, vl2.MaxRoutes, "routes", note)
	cut(&n.Rules, vl2.MaxRules, "rules", note)
	cut(&n.DNS.Servers, vl2.MaxDNSServers, "name servers", note)
	if len(n.Name) > maxName {
		note("its name is cut to %d bytes, as members got it", maxName)
		n.Name = strings.ToValidUTF8(n.Name[:maxName], "")
	}
	if n.MulticastLimit < 0 || n.MulticastLimit > maxMulticastLimit {
		note("multicastLimit %d becomes %d", n.MulticastLimit, min(max(n.MulticastLimit, 0), maxMulticastLimit))
		n.MulticastLimit = min(max(n.MulticastLimit, 0), maxMulticastLimit)
	}
	if n.SSOEnabled {
		note("single sign-on has no page to sign in at here either: members are refused until ssoEnabled is false or they are exempt")
	}
	if n.RemoteTraceTarget != "" || n.RemoteTraceLevel != 0 {
		note("remote trace has no effect here")
	}
	noteUnknown(n.extra, networkKeys, note)
}

func (m *Member) fit(note func(string, ...any)) {
	cut(&m.IPAssignments, vl2.MaxAddresses, "addresses", note)
	if len(m.Name) > 1024 {
		note("its name is cut to 1024 bytes")
		m.Name = strings.ToValidUTF8(m.Name[:1024], "")
	}
	if m.Identity != "" {
		if id, err := identity.Parse(m.Identity); err != nil || id.Address() != m.Address {
			note("its identity can't be used, so that it is refused as before: delete the member to let it in anew")
		}
	}
	noteUnknown(m.extra, memberKeys, note)
}

// cut shortens a list to what the reference uses of it.
func cut[T any](list *[]T, most int, what string, note func(string, ...any)) {
	if n := len(*list); n > most {
		note("%d of its %s are left out: no more than %d are ever used", n-most, what, most)
		*list = (*list)[:most]
	}
}

// Keys of records that mean something here, besides those of the Go types.
var (
	networkKeys = knownKeys(plainNetwork{}, "id", "nwid", "objtype", "certificateTimeoutWindowSize", "clientId", "authorizationEndpoint",
		"capabilitiesByName", "tagsByName", "ssoConfig")
	memberKeys = knownKeys(plainMember{}, "id", "address", "nwid", "objtype", "identity", "name")
)

func knownKeys(of any, more ...string) map[string]bool {
	b, _ := json.Marshal(of) // plain values
	keys := map[string]json.RawMessage{}
	_ = json.Unmarshal(b, &keys)
	out := map[string]bool{}
	for k := range keys {
		out[k] = true
	}
	for _, k := range more {
		out[k] = true
	}
	return out
}

func noteUnknown(extra map[string]json.RawMessage, known map[string]bool, note func(string, ...any)) {
	for _, k := range slices.Sorted(maps.Keys(extra)) {
		if !known[k] {
			note("the key %s is kept, and means nothing here", k)
		}
	}
}
