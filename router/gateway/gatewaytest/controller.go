package gatewaytest

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

	"ztgate/router/control"
	"ztgate/router/gateway"
	"ztgate/zerotier/ztnode"
)

// Controller keeps records in memory.
type Controller struct {
	mu       sync.Mutex
	networks map[ztnode.NetworkID]map[string]any
	members  map[ztnode.NetworkID]map[string]map[string]any
	states   map[string]control.MemberState
}

var _ gateway.Controller = (*Controller)(nil)

// NewController returns a controller without networks.
func NewController() *Controller {
	return &Controller{networks: map[ztnode.NetworkID]map[string]any{}, members: map[ztnode.NetworkID]map[string]map[string]any{},
		states: map[string]control.MemberState{}}
}

// SetState says how a member is seen.
func (c *Controller) SetState(address string, st control.MemberState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.states[address] = st
}

// Presence returns what SetState said.
func (c *Controller) Presence(_ ztnode.NetworkID, address string) control.MemberState {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.states[address]
}

var errUnknown = errors.New("there is no such record")

func merge(record map[string]any, patch json.RawMessage) (json.RawMessage, error) {
	if err := json.Unmarshal(patch, &record); err != nil {
		return nil, err
	}
	return json.Marshal(record)
}

// Networks implements [gateway.Controller].
func (c *Controller) Networks() ([]ztnode.NetworkID, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []ztnode.NetworkID
	for id := range c.networks {
		out = append(out, id)
	}
	slices.SortFunc(out, cmp.Compare[ztnode.NetworkID])
	return out, nil
}

// Network implements [gateway.Controller].
func (c *Controller) Network(id ztnode.NetworkID) (json.RawMessage, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.networks[id] == nil {
		return nil, fmt.Errorf("network %s: %w", id, errUnknown)
	}
	return json.Marshal(c.networks[id])
}

// SetNetwork implements [gateway.Controller].
func (c *Controller) SetNetwork(id ztnode.NetworkID, patch json.RawMessage) (json.RawMessage, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if id == 0 {
		id = ztnode.NetworkID(0xfcd8055969000001 + uint64(len(c.networks)))
	}
	if c.networks[id] == nil {
		c.networks[id] = map[string]any{"id": id.String(), "private": true, "mtu": 2800, "revision": 1}
	}
	return merge(c.networks[id], patch)
}

// DeleteNetwork implements [gateway.Controller].
func (c *Controller) DeleteNetwork(id ztnode.NetworkID) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.networks, id)
	delete(c.members, id)
	return nil
}

// Members implements [gateway.Controller].
func (c *Controller) Members(id ztnode.NetworkID) ([]json.RawMessage, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.networks[id] == nil {
		return nil, fmt.Errorf("network %s: %w", id, errUnknown)
	}
	var out []json.RawMessage
	for _, m := range c.members[id] {
		b, err := json.Marshal(m)
		if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}

// Member implements [gateway.Controller].
func (c *Controller) Member(id ztnode.NetworkID, address string) (json.RawMessage, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := c.members[id][address]
	if m == nil {
		return nil, fmt.Errorf("member %s: %w", address, errUnknown)
	}
	return json.Marshal(m)
}

// SetMember implements [gateway.Controller].
func (c *Controller) SetMember(id ztnode.NetworkID, address string, patch json.RawMessage) (json.RawMessage, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.networks[id] == nil {
		return nil, fmt.Errorf("network %s: %w", id, errUnknown)
	}
	if c.members[id] == nil {
		c.members[id] = map[string]map[string]any{}
	}
	if c.members[id][address] == nil {
		c.members[id][address] = map[string]any{"id": address, "authorized": false, "revision": 1}
	}
	return merge(c.members[id][address], patch)
}

// DeleteMember implements [gateway.Controller].
func (c *Controller) DeleteMember(id ztnode.NetworkID, address string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.members[id], address)
	return nil
}
