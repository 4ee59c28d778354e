package controller

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl2"
)

// Member is a member record (chapter 04 §8): a node that may use a network, or
// that asked for it. Its JSON form is that of the reference; keys of a stored
// record that are not listed here are kept.
type Member struct {
	Address identity.Address `json:"-"` // "id" and "address"
	Network vl2.NetworkID    `json:"-"` // "nwid"

	// Identity is the public identity to which the membership is pinned, in text
	// form; empty until the node asks for the first time. It may be set once.
	Identity string `json:"identity,omitempty"`
	Name     string `json:"name,omitempty"`

	Authorized      bool         `json:"authorized"`
	ActiveBridge    bool         `json:"activeBridge"`
	NoAutoAssignIPs bool         `json:"noAutoAssignIps"`
	IPAssignments   []netip.Addr `json:"ipAssignments"`
	Tags            []TagValue   `json:"tags"`
	Capabilities    []uint32     `json:"capabilities"`

	CreationTime                 int64  `json:"creationTime"` // this and other times: ms since 1970
	Revision                     uint64 `json:"revision"`
	LastAuthorizedTime           int64  `json:"lastAuthorizedTime"`
	LastDeauthorizedTime         int64  `json:"lastDeauthorizedTime"`
	LastAuthorizedCredentialType string `json:"lastAuthorizedCredentialType"` // "", "api", "public", "token"
	LastAuthorizedCredential     string `json:"lastAuthorizedCredential"`     // the token
	AuthenticationExpiryTime     int64  `json:"authenticationExpiryTime"`
	SSOExempt                    bool   `json:"ssoExempt"`

	// Version of the node at its last request; -1 = unknown.
	VMajor int `json:"vMajor"`
	VMinor int `json:"vMinor"`
	VRev   int `json:"vRev"`
	VProto int `json:"vProto"`

	RemoteTraceTarget string `json:"remoteTraceTarget"` // 10 hexadecimal digits or ""
	RemoteTraceLevel  uint64 `json:"remoteTraceLevel"`

	extra map[string]json.RawMessage
}

// TagValue is a member's value of a tag, in JSON [id, value].
type TagValue struct{ ID, Value uint32 }

func newMember(n vl2.NetworkID, a identity.Address, now int64) Member {
	return Member{Address: a, Network: n, CreationTime: now, VMajor: -1, VMinor: -1, VRev: -1, VProto: -1}
}

func (m Member) clone() Member {
	m.IPAssignments = slices.Clone(m.IPAssignments)
	m.Tags = slices.Clone(m.Tags)
	m.Capabilities = slices.Clone(m.Capabilities)
	m.extra = maps.Clone(m.extra)
	return m
}

// stranger reports whether nobody but the node itself cared for the record, so
// that it may be forgotten.
func (m *Member) stranger() bool {
	return !m.Authorized && m.LastAuthorizedTime == 0 && m.Name == "" && len(m.IPAssignments) == 0 &&
		len(m.Tags) == 0 && len(m.Capabilities) == 0 && !m.SSOExempt && !m.ActiveBridge && !m.NoAutoAssignIPs
}

// normalize is normalize of Network for members, old being the record before the
// change.
func (m *Member) normalize(old *Member) error {
	m.Address, m.Network = old.Address, old.Network
	m.CreationTime, m.Revision = old.CreationTime, old.Revision
	m.LastAuthorizedTime, m.LastDeauthorizedTime = old.LastAuthorizedTime, old.LastDeauthorizedTime
	m.LastAuthorizedCredentialType, m.LastAuthorizedCredential = old.LastAuthorizedCredentialType, old.LastAuthorizedCredential
	m.VMajor, m.VMinor, m.VRev, m.VProto = old.VMajor, old.VMinor, old.VRev, old.VProto
	slices.Sort(m.Capabilities)
	m.Capabilities = slices.Compact(m.Capabilities)
	m.Tags = uniqueByID(m.Tags, func(t TagValue) uint32 { return t.ID })
	switch {
	case len(m.IPAssignments) > vl2.MaxAddresses:
		return fmt.Errorf("ipAssignments: more than %d", vl2.MaxAddresses)
	case len(m.Capabilities) > vl2.MaxCapabilities:
		return fmt.Errorf("capabilities: more than %d", vl2.MaxCapabilities)
	case len(m.Tags) > vl2.MaxTags:
		return fmt.Errorf("tags: more than %d", vl2.MaxTags)
	case len(m.Name) > 1024:
		return errors.New("name: longer than 1024 bytes")
	}
	if err := checkTrace(m.RemoteTraceTarget); err != nil {
		return err
	}
	return m.checkIdentity(old)
}

func (m *Member) checkIdentity(old *Member) error {
	if m.Identity == old.Identity {
		return nil
	}
	if old.Identity != "" {
		return errors.New("identity: is pinned; delete the member to replace it")
	}
	id, err := identity.Parse(m.Identity)
	if err == nil {
		err = id.Validate()
	}
	if err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	if id.Address() != m.Address {
		return fmt.Errorf("identity: belongs to %s", id.Address())
	}
	m.Identity = id.Public().String()
	return nil
}

type plainMember Member

// MarshalJSON writes the stored form.
func (m Member) MarshalJSON() ([]byte, error) {
	m.IPAssignments, m.Tags, m.Capabilities = orEmpty(m.IPAssignments), orEmpty(m.Tags), orEmpty(m.Capabilities)
	b, err := marshalRecord(plainMember(m), m.extra, "remoteTraceTarget,lastAuthorizedCredentialType,lastAuthorizedCredential",
		map[string]any{"id": m.Address.String(), "address": m.Address.String(), "nwid": m.Network.String(), "objtype": "member"})
	return b, err
}

// UnmarshalJSON reads the stored form; absent keys get their defaults.
func (m *Member) UnmarshalJSON(b []byte) error {
	out := newMember(0, 0, 0)
	if err := json.Unmarshal(b, (*plainMember)(&out)); err != nil {
		return fmt.Errorf("decode member: %w", err)
	}
	extra, id, err := splitRecord(b, "id", "address")
	if err != nil {
		return fmt.Errorf("decode member: %w", err)
	}
	if out.Address, err = identity.ParseAddress(id); err != nil {
		return fmt.Errorf("decode member: %w", err)
	}
	var where struct {
		Network string `json:"nwid"`
	}
	if err := json.Unmarshal(b, &where); err != nil {
		return fmt.Errorf("decode member: %w", err)
	}
	if where.Network != "" {
		if out.Network, err = vl2.ParseNetworkID(where.Network); err != nil {
			return fmt.Errorf("decode member: %w", err)
		}
	}
	out.extra = extra
	*m = out
	return nil
}

// Patch is [Network.Patch] for members.
func (m *Member) Patch(b []byte) error {
	body, err := patchKeys(b, "authorized", "activeBridge", "noAutoAssignIps", "ipAssignments", "tags", "capabilities", "name",
		"authenticationExpiryTime", "ssoExempt", "remoteTraceTarget", "remoteTraceLevel", "identity")
	if err != nil {
		return err
	}
	for key := range body {
		switch key {
		case "ipAssignments":
			m.IPAssignments = nil
		case "tags":
			m.Tags = nil
		case "capabilities":
			m.Capabilities = nil
		case "remoteTraceTarget":
			m.RemoteTraceTarget = ""
		}
	}
	return decodeKeys(body, (*plainMember)(m))
}

// MarshalJSON writes [id, value].
func (t TagValue) MarshalJSON() ([]byte, error) { return json.Marshal([2]uint32{t.ID, t.Value}) }

// UnmarshalJSON reads [id, value].
func (t *TagValue) UnmarshalJSON(b []byte) error {
	var pair []uint32
	if err := json.Unmarshal(b, &pair); err != nil {
		return err
	}
	if len(pair) != 2 {
		return errors.New("tag: want [id, value]")
	}
	t.ID, t.Value = pair[0], pair[1]
	return nil
}
