package vl2

import (
	"fmt"
	"slices"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/wire"
)

// Limits of credentials (chapter 03 §10).
const (
	maxQualifiers      = 8
	maxCapabilityRules = 64
	maxCustody         = 7
	maxThings          = 16
	maxPerPacket       = 256 // credentials of one kind looked at

	credentialMark = 0x7f7f7f7f7f7f7f7f
)

// Credential is a certificate, capability, tag or revocation that a controller
// signed.
type Credential interface {
	Network() NetworkID
	Holder() identity.Address // to whom it was issued; of a revocation, its target
	SignedBy() identity.Address
	Verify(controller *identity.Identity) bool
	IsRevocation() bool
	FastPropagate() bool
	Append(b []byte) []byte
}

// Qualifier is one statement of a certificate of membership.
type Qualifier struct{ ID, Value, MaxDelta uint64 }

// Qualifier IDs (chapter 03 §3.2).
const (
	qualTimestamp = 0
	qualNetwork   = 1
	qualIssuedTo  = 2
	qualHash      = 3 // to 6

	anyDelta = 1<<64 - 1
)

// COM is a certificate of membership.
type COM struct {
	Qualifiers []Qualifier
	Signer     identity.Address
	Signature  [identity.SignatureLen]byte
}

// NewCOM makes and signs a certificate (chapter 04 §4).
func NewCOM(signer *identity.Identity, n NetworkID, holder *identity.Identity, timestamp, timeDelta int64) (*COM, error) {
	c := &COM{Signer: signer.Address(), Qualifiers: []Qualifier{
		{qualTimestamp, uint64(timestamp), uint64(timeDelta)},
		{qualNetwork, uint64(n), 0},
		{qualIssuedTo, uint64(holder.Address()), anyDelta},
	}}
	for i, v := range hashQualifiers(holder) {
		c.Qualifiers = append(c.Qualifiers, Qualifier{qualHash + uint64(i), v, anyDelta})
	}
	sig, err := signer.Sign(c.message())
	c.Signature = sig
	return c, err
}

func hashQualifiers(id *identity.Identity) (out [4]uint64) {
	h := id.Fingerprint()
	for i := range out {
		out[i] = be.Uint64(h[8*i:])
	}
	return out
}

// ParseCOM reads a certificate from the start of b.
func ParseCOM(b []byte) (*COM, int, error) {
	r := reader{Reader: wire.Reader{Buf: b}}
	c := &COM{}
	if r.U8() != 1 {
		return nil, 0, fmt.Errorf("certificate of membership: %w", ErrMalformed)
	}
	n := int(r.U16())
	if n > maxQualifiers {
		return nil, 0, fmt.Errorf("certificate of membership: %w: %d qualifiers", ErrMalformed, n)
	}
	for i := range n {
		q := Qualifier{r.U64(), r.U64(), r.U64()}
		if i > 0 && q.ID < c.Qualifiers[i-1].ID {
			return nil, 0, fmt.Errorf("certificate of membership: %w: qualifiers out of order", ErrMalformed)
		}
		c.Qualifiers = append(c.Qualifiers, q)
	}
	if c.Signer = r.Address(); c.Signer != 0 {
		copy(c.Signature[:], r.Bytes(identity.SignatureLen))
	}
	if r.Failed {
		return nil, 0, fmt.Errorf("certificate of membership: %w", ErrMalformed)
	}
	return c, r.Off, nil
}

// Append implements [Credential].
func (c *COM) Append(b []byte) []byte {
	b = be.AppendUint16(append(b, 1), uint16(len(c.Qualifiers)))
	b = append(b, c.message()...)
	b = c.Signer.Append(b)
	if c.Signer != 0 {
		b = append(b, c.Signature[:]...)
	}
	return b
}

func (c *COM) message() (b []byte) {
	for _, q := range c.Qualifiers {
		b = be.AppendUint64(be.AppendUint64(be.AppendUint64(b, q.ID), q.Value), q.MaxDelta)
	}
	return b
}

func (c *COM) first(id uint64) uint64 {
	for _, q := range c.Qualifiers {
		if q.ID == id {
			return q.Value
		}
	}
	return 0
}

// last is what counts in comparisons if an ID is repeated.
func (c *COM) last(id uint64) (uint64, bool) {
	for _, q := range slices.Backward(c.Qualifiers) {
		if q.ID == id {
			return q.Value, true
		}
	}
	return 0, false
}

// Timestamp is when it was issued, ms.
func (c *COM) Timestamp() int64 { return int64(c.first(qualTimestamp)) }

// TimeDelta is by how much the timestamps of members may differ, ms.
func (c *COM) TimeDelta() int64 {
	for _, q := range c.Qualifiers {
		if q.ID == qualTimestamp {
			return int64(q.MaxDelta)
		}
	}
	return 0
}

// Network implements [Credential].
func (c *COM) Network() NetworkID { return NetworkID(c.first(qualNetwork)) }

// Holder implements [Credential].
func (c *COM) Holder() identity.Address { return identity.Address(c.first(qualIssuedTo)) }

// SignedBy implements [Credential].
func (c *COM) SignedBy() identity.Address { return c.Signer }

// IsRevocation implements [Credential].
func (c *COM) IsRevocation() bool { return false }

// FastPropagate implements [Credential].
func (c *COM) FastPropagate() bool { return false }

// Verify implements [Credential].
func (c *COM) Verify(controller *identity.Identity) bool {
	return c.Signer != 0 && c.Signer == c.Network().Controller() && controller.Address() == c.Signer &&
		controller.Verify(c.message(), c.Signature[:])
}

// Agrees reports whether a node with a certificate and identity is a member in
// the eyes of the holder of c (chapter 03 §3.2).
func (c *COM) Agrees(theirs *COM, id *identity.Identity) bool {
	if theirs == nil || len(c.Qualifiers) == 0 || len(theirs.Qualifiers) == 0 {
		return false
	}
	hashed := false
	for _, q := range c.Qualifiers {
		v, ok := theirs.last(q.ID)
		if !ok || max(v, q.Value)-min(v, q.Value) > q.MaxDelta {
			return false
		}
		hashed = hashed || q.ID >= qualHash && q.ID < qualHash+4
	}
	if hashed {
		for i, want := range hashQualifiers(id) {
			if v, ok := theirs.last(qualHash + uint64(i)); !ok || v != want {
				return false
			}
		}
	}
	return true
}

// signed is what tags, capabilities, certificates of ownership and revocations
// have in common.
type signed struct {
	Signature [identity.SignatureLen]byte
}

// block reads a signature block; one of another type leaves zeros.
func (s *signed) block(r *reader) {
	typ, n := r.U8(), int(r.U16())
	b := r.Bytes(n)
	if typ != 1 {
		return
	}
	if n != identity.SignatureLen {
		r.Failed = true
		return
	}
	copy(s.Signature[:], b)
}

func (s *signed) appendBlock(b []byte) []byte {
	return append(be.AppendUint16(append(b, 1), identity.SignatureLen), s.Signature[:]...)
}

// marked puts the marks around a message.
func marked(f func(b []byte) []byte) []byte {
	return be.AppendUint64(f(be.AppendUint64(nil, credentialMark)), credentialMark)
}

func issuedBy(signer identity.Address, n NetworkID, controller *identity.Identity) bool {
	return signer == n.Controller() && controller.Address() == signer
}

// Tag says that its holder has a value for a tag number.
type Tag struct {
	signed
	NetworkID NetworkID
	Timestamp int64
	ID, Value uint32
	IssuedTo  identity.Address
	Signer    identity.Address
}

// ParseTag reads a tag from the start of b.
func ParseTag(b []byte) (*Tag, int, error) {
	r := reader{Reader: wire.Reader{Buf: b}}
	t := &Tag{NetworkID: r.networkID(), Timestamp: int64(r.U64()), ID: r.U32(), Value: r.U32(), IssuedTo: r.Address(), Signer: r.Address()}
	t.block(&r)
	r.Bytes(int(r.U16()))
	if r.Failed {
		return nil, 0, fmt.Errorf("tag: %w", ErrMalformed)
	}
	return t, r.Off, nil
}

func (t *Tag) body(b []byte) []byte {
	b = be.AppendUint64(t.NetworkID.Append(b), uint64(t.Timestamp))
	b = be.AppendUint32(be.AppendUint32(b, t.ID), t.Value)
	return t.Signer.Append(t.IssuedTo.Append(b))
}

func (t *Tag) message() []byte {
	return marked(func(b []byte) []byte { return append(t.body(b), 0, 0) })
}

// Sign signs the tag.
func (t *Tag) Sign(signer *identity.Identity) (err error) {
	t.Signer = signer.Address()
	t.Signature, err = signer.Sign(t.message())
	return err
}

// Append implements [Credential].
func (t *Tag) Append(b []byte) []byte { return append(t.appendBlock(t.body(b)), 0, 0) }

// Network implements [Credential].
func (t *Tag) Network() NetworkID { return t.NetworkID }

// Holder implements [Credential].
func (t *Tag) Holder() identity.Address { return t.IssuedTo }

// SignedBy implements [Credential].
func (t *Tag) SignedBy() identity.Address { return t.Signer }

// IsRevocation implements [Credential].
func (t *Tag) IsRevocation() bool { return false }

// FastPropagate implements [Credential].
func (t *Tag) FastPropagate() bool { return false }

// Verify implements [Credential].
func (t *Tag) Verify(controller *identity.Identity) bool {
	return issuedBy(t.Signer, t.NetworkID, controller) && controller.Verify(t.message(), t.Signature[:])
}

// Custody is one link of a capability's chain.
type Custody struct {
	signed
	To, From identity.Address
}

// Capability says that its holder may send what its rules accept.
type Capability struct {
	NetworkID NetworkID
	Timestamp int64
	ID        uint32
	Rules     []Rule
	MaxChain  uint8
	Chain     []Custody
	raw       []byte // rules as received: they are what was signed
}

// ParseCapability reads a capability from the start of b.
func ParseCapability(b []byte) (*Capability, int, error) {
	bad := func(why string) (*Capability, int, error) {
		return nil, 0, fmt.Errorf("capability: %w: %s", ErrMalformed, why)
	}
	r := reader{Reader: wire.Reader{Buf: b}}
	c := &Capability{NetworkID: r.networkID(), Timestamp: int64(r.U64()), ID: r.U32()}
	n := int(r.U16())
	if n > maxCapabilityRules {
		return bad("too many rules")
	}
	start := r.Off
	for range n {
		r.U8()
		r.Bytes(int(r.U8()))
	}
	if r.Failed {
		return bad("rules cut short")
	}
	c.raw = append([]byte(nil), b[start:r.Off]...)
	rules, err := ParseRules(c.raw, maxCapabilityRules)
	if err != nil {
		return bad("bad rule")
	}
	c.Rules = rules
	c.MaxChain = r.U8()
	if c.MaxChain < 1 || c.MaxChain > maxCustody {
		return bad("custody chain limit")
	}
	for {
		to := r.Address()
		if r.Failed {
			return bad("custody chain cut short")
		}
		if to == 0 {
			break
		}
		if len(c.Chain) >= int(c.MaxChain) {
			return bad("custody chain too long")
		}
		link := Custody{To: to, From: r.Address()}
		link.block(&r)
		c.Chain = append(c.Chain, link)
	}
	r.Bytes(int(r.U16()))
	if r.Failed {
		return bad("cut short")
	}
	return c, r.Off, nil
}

func (c *Capability) head(b []byte) []byte {
	b = be.AppendUint64(c.NetworkID.Append(b), uint64(c.Timestamp))
	b = be.AppendUint16(be.AppendUint32(b, c.ID), uint16(len(c.Rules)))
	if c.raw != nil {
		b = append(b, c.raw...)
	} else {
		b = AppendRules(b, c.Rules)
	}
	return append(b, c.MaxChain)
}

func (c *Capability) message() []byte {
	return marked(func(b []byte) []byte { return append(c.head(b), 0, 0) })
}

// Issue makes the chain of one link from the controller to the holder.
func (c *Capability) Issue(signer *identity.Identity, to identity.Address) error {
	return c.IssueChain(1, signer, to)
}

// IssueChain is Issue with leave to pass the capability on: the chain may get most
// links.
func (c *Capability) IssueChain(most uint8, signer *identity.Identity, to identity.Address) error {
	c.MaxChain, c.Chain = most, nil
	return c.PassOn(signer, to)
}

// PassOn adds a link from the holder to the next one.
func (c *Capability) PassOn(signer *identity.Identity, to identity.Address) (err error) {
	if len(c.Chain) >= int(c.MaxChain) || c.MaxChain > maxCustody {
		return fmt.Errorf("capability %d: %w: custody chain too long", c.ID, ErrMalformed)
	}
	link := Custody{To: to, From: signer.Address()}
	link.Signature, err = signer.Sign(c.message())
	c.Chain = append(c.Chain, link)
	return err
}

// Append implements [Credential].
func (c *Capability) Append(b []byte) []byte {
	b = c.head(b)
	for i := range c.Chain {
		b = c.Chain[i].From.Append(c.Chain[i].To.Append(b))
		b = c.Chain[i].appendBlock(b)
	}
	return append(identity.Address(0).Append(b), 0, 0)
}

// Network implements [Credential].
func (c *Capability) Network() NetworkID { return c.NetworkID }

// Holder implements [Credential].
func (c *Capability) Holder() identity.Address {
	if len(c.Chain) == 0 {
		return 0
	}
	return c.Chain[len(c.Chain)-1].To
}

// SignedBy implements [Credential].
func (c *Capability) SignedBy() identity.Address {
	if len(c.Chain) == 0 {
		return 0
	}
	return c.Chain[0].From
}

// IsRevocation implements [Credential].
func (c *Capability) IsRevocation() bool { return false }

// FastPropagate implements [Credential].
func (c *Capability) FastPropagate() bool { return false }

// Verify implements [Credential]. Only chains of one link can be verified with
// the controller's identity alone; [Capability.VerifyChain] takes longer ones.
func (c *Capability) Verify(controller *identity.Identity) bool {
	return len(c.Chain) == 1 && c.VerifyIssue(controller)
}

// VerifyIssue checks the first link: that the controller issued the capability,
// whoever has it now.
func (c *Capability) VerifyIssue(controller *identity.Identity) bool {
	return len(c.Chain) > 0 && issuedBy(c.Chain[0].From, c.NetworkID, controller) &&
		controller.Verify(c.message(), c.Chain[0].Signature[:])
}

// VerifyChain checks all links (chapter 03 §3.4); holder finds the identities of
// those who passed the capability on, nil fails.
func (c *Capability) VerifyChain(controller *identity.Identity, holder func(identity.Address) *identity.Identity) bool {
	if !c.VerifyIssue(controller) {
		return false
	}
	message := c.message()
	for i := 1; i < len(c.Chain); i++ {
		link := &c.Chain[i]
		if link.From != c.Chain[i-1].To {
			return false
		}
		id := controller
		if link.From != controller.Address() {
			id = holder(link.From)
		}
		if id == nil || id.Address() != link.From || !id.Verify(message, link.Signature[:]) {
			return false
		}
	}
	return true
}

// Thing types of certificates of ownership.
const (
	ThingMAC  = 1
	ThingIPv4 = 2
	ThingIPv6 = 3
)

// Thing is a MAC or IP address that a member owns.
type Thing struct {
	Type  uint8
	Value [16]byte
}

// COO is a certificate of ownership.
type COO struct {
	signed
	NetworkID NetworkID
	Timestamp int64
	Flags     uint64
	ID        uint32
	Things    []Thing
	IssuedTo  identity.Address
	Signer    identity.Address
}

// ParseCOO reads a certificate of ownership from the start of b.
func ParseCOO(b []byte) (*COO, int, error) {
	r := reader{Reader: wire.Reader{Buf: b}}
	c := &COO{NetworkID: r.networkID(), Timestamp: int64(r.U64()), Flags: r.U64(), ID: r.U32()}
	n := int(r.U16())
	if n > maxThings {
		return nil, 0, fmt.Errorf("certificate of ownership: %w: %d things", ErrMalformed, n)
	}
	for range n {
		t := Thing{Type: r.U8()}
		copy(t.Value[:], r.Bytes(16))
		c.Things = append(c.Things, t)
	}
	c.IssuedTo, c.Signer = r.Address(), r.Address()
	c.block(&r)
	r.Bytes(int(r.U16()))
	if r.Failed {
		return nil, 0, fmt.Errorf("certificate of ownership: %w", ErrMalformed)
	}
	return c, r.Off, nil
}

func (c *COO) body(b []byte) []byte {
	b = be.AppendUint64(c.NetworkID.Append(b), uint64(c.Timestamp))
	b = be.AppendUint64(b, c.Flags)
	b = be.AppendUint16(be.AppendUint32(b, c.ID), uint16(len(c.Things)))
	for _, t := range c.Things {
		b = append(append(b, t.Type), t.Value[:]...)
	}
	return c.Signer.Append(c.IssuedTo.Append(b))
}

func (c *COO) message() []byte {
	return marked(func(b []byte) []byte { return append(c.body(b), 0, 0) })
}

// Sign signs the certificate.
func (c *COO) Sign(signer *identity.Identity) (err error) {
	c.Signer = signer.Address()
	c.Signature, err = signer.Sign(c.message())
	return err
}

// Append implements [Credential].
func (c *COO) Append(b []byte) []byte { return append(c.appendBlock(c.body(b)), 0, 0) }

// Network implements [Credential].
func (c *COO) Network() NetworkID { return c.NetworkID }

// Holder implements [Credential].
func (c *COO) Holder() identity.Address { return c.IssuedTo }

// SignedBy implements [Credential].
func (c *COO) SignedBy() identity.Address { return c.Signer }

// IsRevocation implements [Credential].
func (c *COO) IsRevocation() bool { return false }

// FastPropagate implements [Credential].
func (c *COO) FastPropagate() bool { return false }

// Verify implements [Credential].
func (c *COO) Verify(controller *identity.Identity) bool {
	return issuedBy(c.Signer, c.NetworkID, controller) && controller.Verify(c.message(), c.Signature[:])
}

// Credential types in revocations (chapter 03 §3.1).
const (
	TypeCOM        = 1
	TypeCapability = 2
	TypeTag        = 3
	TypeCOO        = 4
)

// Revocation voids credentials of a node up to a time.
type Revocation struct {
	signed
	ID           uint32
	NetworkID    NetworkID
	CredentialID uint32 // 0 for certificates of membership
	Threshold    int64  // ms: credentials up to this time are void
	Flags        uint64
	Target       identity.Address
	Signer       identity.Address
	Type         uint8
}

// ParseRevocation reads a revocation from the start of b.
func ParseRevocation(b []byte) (*Revocation, int, error) {
	r := reader{Reader: wire.Reader{Buf: b}}
	r.U32()
	v := &Revocation{ID: r.U32(), NetworkID: r.networkID()}
	r.U32()
	v.CredentialID = r.U32()
	v.Threshold, v.Flags = int64(r.U64()), r.U64()
	v.Target, v.Signer, v.Type = r.Address(), r.Address(), r.U8()
	v.block(&r)
	r.Bytes(int(r.U16()))
	if r.Failed {
		return nil, 0, fmt.Errorf("revocation: %w", ErrMalformed)
	}
	return v, r.Off, nil
}

func (v *Revocation) body(b []byte) []byte {
	b = be.AppendUint32(be.AppendUint32(b, 0), v.ID)
	b = be.AppendUint32(v.NetworkID.Append(b), 0)
	b = be.AppendUint32(b, v.CredentialID)
	b = be.AppendUint64(be.AppendUint64(b, uint64(v.Threshold)), v.Flags)
	return append(v.Signer.Append(v.Target.Append(b)), v.Type)
}

func (v *Revocation) message() []byte {
	return marked(func(b []byte) []byte { return append(v.body(b), 0, 0) })
}

// Sign signs the revocation.
func (v *Revocation) Sign(signer *identity.Identity) (err error) {
	v.Signer = signer.Address()
	v.Signature, err = signer.Sign(v.message())
	return err
}

// Append implements [Credential].
func (v *Revocation) Append(b []byte) []byte { return append(v.appendBlock(v.body(b)), 0, 0) }

// Network implements [Credential].
func (v *Revocation) Network() NetworkID { return v.NetworkID }

// Holder implements [Credential].
func (v *Revocation) Holder() identity.Address { return v.Target }

// SignedBy implements [Credential].
func (v *Revocation) SignedBy() identity.Address { return v.Signer }

// IsRevocation implements [Credential].
func (v *Revocation) IsRevocation() bool { return true }

// FastPropagate implements [Credential].
func (v *Revocation) FastPropagate() bool { return v.Flags&flagPropagate != 0 }

// Verify implements [Credential].
func (v *Revocation) Verify(controller *identity.Identity) bool {
	return issuedBy(v.Signer, v.NetworkID, controller) && controller.Verify(v.message(), v.Signature[:])
}

// FlagPropagate of a revocation asks members to pass it on.
const FlagPropagate = flagPropagate

// AppendCredentials appends the payload of NETWORK_CREDENTIALS (chapter 03 §3.9).
func AppendCredentials(b []byte, list ...Credential) []byte {
	for _, c := range list {
		if com, ok := c.(*COM); ok {
			b = com.Append(b)
		}
	}
	b = append(b, 0)
	for _, kind := range []func(Credential) bool{
		func(c Credential) bool { _, ok := c.(*Capability); return ok },
		func(c Credential) bool { _, ok := c.(*Tag); return ok },
		func(c Credential) bool { _, ok := c.(*Revocation); return ok },
		func(c Credential) bool { _, ok := c.(*COO); return ok },
	} {
		at := len(b)
		b = append(b, 0, 0)
		n := uint16(0)
		for _, c := range list {
			if kind(c) {
				b = c.Append(b)
				n++
			}
		}
		be.PutUint16(b[at:], n)
	}
	return b
}

// ParseCredentials reads NETWORK_CREDENTIALS. After an error the credentials
// before the malformed one are returned with it.
func ParseCredentials(b []byte) (list []Credential, err error) {
	for len(b) > 0 && b[0] == 1 && len(list) < maxPerPacket {
		c, n, err := ParseCOM(b)
		if err != nil {
			return list, err
		}
		list, b = append(list, c), b[n:]
	}
	if len(b) == 0 {
		return list, nil
	}
	if b[0] != 0 {
		return list, fmt.Errorf("credentials: %w", ErrMalformed)
	}
	b = b[1:]
	for _, parse := range []func([]byte) (Credential, int, error){
		func(b []byte) (Credential, int, error) { return wrap(ParseCapability(b)) },
		func(b []byte) (Credential, int, error) { return wrap(ParseTag(b)) },
		func(b []byte) (Credential, int, error) { return wrap(ParseRevocation(b)) },
		func(b []byte) (Credential, int, error) { return wrap(ParseCOO(b)) },
	} {
		if len(b) < 2 {
			return list, nil
		}
		count := int(be.Uint16(b))
		b = b[2:]
		for i := range count {
			if i >= maxPerPacket {
				return list, fmt.Errorf("credentials: %w: too many", ErrMalformed)
			}
			c, n, err := parse(b)
			if err != nil {
				return list, err
			}
			list, b = append(list, c), b[n:]
		}
	}
	return list, nil
}

func wrap[T Credential](c T, n int, err error) (Credential, int, error) { return c, n, err }
