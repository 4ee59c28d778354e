package admin

import (
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"ztgate/internal/atomicfile"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/ztnode"
)

// PlanetSpec says what planet to make.
type PlanetSpec struct {
	ID    uint64   // 0 = that of the signing key's planet, or a random one
	Roots []string // IDENTITY=ENDPOINT[,ENDPOINT...]; see parseRoot
	Key   string   // text of the signing key, "" = make one
	Now   time.Time
}

// Planet is a planet in a form for people.
type Planet struct {
	Schema    int                 `json:"schema"`
	Type      string              `json:"type"`
	ID        uint64              `json:"id"`
	Timestamp int64               `json:"timestamp"` // ms since the epoch
	UpdateKey string              `json:"updatesMustBeSignedBy"`
	Roots     []ztnode.PlanetRoot `json:"roots"`
}

// MakePlanet makes and signs a planet. It returns the file's content and the
// signing key that later revisions need.
func MakePlanet(spec PlanetSpec) (file []byte, key string, p Planet, err error) {
	if len(spec.Roots) == 0 || len(spec.Roots) > vl1.MaxRoots {
		return nil, "", p, fault.Usagef("planet has %d roots: give 1 to %d with --root", len(spec.Roots), vl1.MaxRoots)
	}
	var roots []vl1.Root
	for _, text := range spec.Roots {
		root, err := parseRoot(text)
		if err != nil {
			return nil, "", p, err
		}
		if slices.ContainsFunc(roots, func(r vl1.Root) bool { return r.Identity.Equal(root.Identity) }) {
			return nil, "", p, fault.Usagef("root %s is given twice", root.Identity.Address())
		}
		roots = append(roots, root)
	}
	var k planetKey
	if spec.Key != "" {
		if k, err = parsePlanetKey(spec.Key); err != nil {
			return nil, "", p, err
		}
	} else if k, err = newPlanetKey(); err != nil {
		return nil, "", p, err
	}
	if spec.ID != 0 {
		k.id = spec.ID
	}
	w := vl1.NewPlanet(k.id, spec.Now.UnixMilli(), roots, k.public)
	w.Sign(k.secret)
	file = w.Append(nil)
	return file, k.String(), describe(w), nil
}

// parseRoot reads IDENTITY=ENDPOINTS. IDENTITY is a public identity or a file
// with one, an endpoint ADDRESS/PORT or ADDRESS:PORT.
func parseRoot(text string) (vl1.Root, error) {
	who, where, ok := strings.Cut(text, "=")
	if !ok {
		return vl1.Root{}, fault.Usagef("root %q: give IDENTITY=ADDRESS/PORT[,ADDRESS/PORT], where IDENTITY may be a file", text)
	}
	id, err := identity.Parse(who)
	if err != nil {
		b, rerr := os.ReadFile(who)
		if rerr != nil {
			return vl1.Root{}, fault.Usagef("root %q: neither an identity nor a file: %w", who, rerr)
		}
		if id, err = identity.Parse(string(b)); err != nil {
			return vl1.Root{}, fault.Usagef("root %q: %w", who, err)
		}
	}
	if err := id.Validate(); err != nil {
		return vl1.Root{}, fault.Usagef("root %s: %w", id.Address(), err)
	}
	root := vl1.Root{Identity: id.Public()}
	for _, e := range strings.Split(where, ",") {
		ep, err := config.ParseEndpoint(e)
		if err != nil {
			return vl1.Root{}, err
		}
		root.Endpoints = append(root.Endpoints, ep)
	}
	if len(root.Endpoints) > vl1.MaxEndpoints {
		return vl1.Root{}, fault.Usagef("root %s has %d endpoints: give at most %d", id.Address(), len(root.Endpoints), vl1.MaxEndpoints)
	}
	return root, nil
}

// ShowPlanet reads a planet file.
func ShowPlanet(file []byte) (Planet, error) {
	w, _, err := vl1.ParseWorld(file)
	if err != nil {
		return Planet{}, fault.Usage(err)
	}
	return describe(w), nil
}

func describe(w *vl1.World) Planet {
	p := Planet{Schema: control.Schema, Type: "moon", ID: w.ID, Timestamp: w.Timestamp, UpdateKey: hex.EncodeToString(w.UpdateKey[:]),
		Roots: w.PlanetRoots()}
	if w.IsPlanet() {
		p.Type = "planet"
	}
	return p
}

// planetKey is what signs the revisions of one planet.
type planetKey struct {
	id             uint64
	public, secret vl1.Key
}

const planetKeyHead = "ztgate-planet-key-1"

func newPlanetKey() (k planetKey, err error) {
	var id [4]byte
	rand.Read(id[:]) // never fails
	k.id = uint64(binary.BigEndian.Uint32(id[:])) | 1
	rand.Read(k.secret[:])
	dh, err := ecdh.X25519().NewPrivateKey(k.secret[:32])
	if err != nil {
		return k, fmt.Errorf("make planet key: %w", err)
	}
	copy(k.public[:32], dh.PublicKey().Bytes())
	copy(k.public[32:], ed25519.NewKeyFromSeed(k.secret[32:]).Public().(ed25519.PublicKey))
	return k, nil
}

func (k planetKey) String() string {
	return fmt.Sprintf("%s:%d:%x:%x\n", planetKeyHead, k.id, k.public[:], k.secret[:])
}

func parsePlanetKey(text string) (k planetKey, err error) {
	f := strings.Split(strings.TrimSpace(text), ":")
	bad := fault.Usagef("planet key: want %s:ID:PUBLIC:SECRET, as planet make writes it", planetKeyHead)
	if len(f) != 4 || f[0] != planetKeyHead {
		return k, bad
	}
	if k.id, err = strconv.ParseUint(f[1], 10, 64); err != nil {
		return k, bad
	}
	for i, dst := range []*vl1.Key{&k.public, &k.secret} {
		b, err := hex.DecodeString(f[2+i])
		if err != nil || len(b) != len(dst) {
			return k, bad
		}
		copy(dst[:], b)
	}
	return k, nil
}

// WritePlanet makes a planet and writes its file and, if it is new, its signing
// key. A key file that exists is used, which makes a later revision.
func WritePlanet(spec PlanetSpec, out, keyPath string, force bool) (Planet, error) {
	b, err := os.ReadFile(keyPath)
	switch {
	case err == nil:
		spec.Key = string(b)
	case !errors.Is(err, fs.ErrNotExist):
		return Planet{}, fault.Usage(err)
	}
	file, key, p, err := MakePlanet(spec)
	if err != nil {
		return p, err
	}
	if !force {
		if err := mayReplacePlanet(out, file); err != nil {
			return p, err
		}
	}
	if spec.Key == "" { // first the key: a planet without it could never be changed
		if err := atomicfile.Write(keyPath, []byte(key), 0o600); err != nil {
			return p, err
		}
	}
	return p, atomicfile.Write(out, file, 0o644)
}

// mayReplacePlanet allows a later revision of the same planet.
func mayReplacePlanet(path string, file []byte) error {
	old, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	ow, _, err1 := vl1.ParseWorld(old)
	nw, _, err2 := vl1.ParseWorld(file)
	if err1 != nil || err2 != nil || ow.ID == 0 || !nw.Replaces(ow) {
		return fault.Usagef("%s exists and the new planet is no later revision of it: choose another file, or replace it with --force", path)
	}
	return nil
}

// ReadPlanet shows the planet in a file, or in standard input if path is "-".
func ReadPlanet(path string, in io.Reader) (Planet, error) {
	b, err := readInput(path, in)
	if err != nil {
		return Planet{}, err
	}
	p, err := ShowPlanet(b)
	if err != nil {
		return p, fmt.Errorf("%s: %w", nameOf(path), err)
	}
	return p, nil
}
