package gateway

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/zerotier/controller"
	"ztgate/zerotier/ztnode"
)

// goController is the controller of the node in pure Go.
type goController struct{ c *controller.Controller }

// Handler serves the reference's HTTP API.
func (g goController) Handler() http.Handler { return g.c.Handler() }

// Admit implements [admitter].
func (g goController) Admit(e ztnode.MemberEvent, patch json.RawMessage) error {
	_, err := g.c.Admit(e, func(m *controller.Member) error { return m.Patch(patch) })
	return err
}

// Presence implements [observer].
func (g goController) Presence(id ztnode.NetworkID, address string) control.MemberState {
	a, err := config.MemberAddress(address)
	if err != nil {
		return control.MemberState{}
	}
	p := g.c.Presence(id, a)
	return control.MemberState{Asked: p.Asked, Online: p.Online(), LastRequest: p.Last}
}

// controllerError marks what the caller can set right.
func controllerError(err error) error {
	if errors.Is(err, controller.ErrInvalid) || errors.Is(err, controller.ErrNotFound) || errors.Is(err, controller.ErrExists) {
		return fault.Usage(err)
	}
	return err
}

func (g goController) Networks() ([]ztnode.NetworkID, error) {
	out := []ztnode.NetworkID{}
	for _, n := range g.c.Networks() {
		out = append(out, n.ID)
	}
	return out, nil
}

func (g goController) Network(id ztnode.NetworkID) (json.RawMessage, error) {
	n, ok := g.c.Network(id)
	if !ok {
		return nil, noNetwork(id)
	}
	return json.Marshal(n)
}

func noNetwork(id ztnode.NetworkID) error {
	return fault.Usagef("network %s: this controller has no such network: see ztgate controller list", id)
}

func (g goController) SetNetwork(id ztnode.NetworkID, patch json.RawMessage) (json.RawMessage, error) {
	if _, ok := g.c.Network(id); id != 0 && ok {
		n, err := g.c.UpdateNetwork(id, func(n *controller.Network) error { return n.Patch(patch) })
		return marshalRecord(n, err)
	}
	rec := controller.DefaultNetwork()
	rec.ID = id
	if err := rec.Patch(patch); err != nil {
		return nil, controllerError(err)
	}
	n, err := g.c.CreateNetwork(rec)
	return marshalRecord(n, err)
}

func marshalRecord(rec any, err error) (json.RawMessage, error) {
	if err != nil {
		return nil, controllerError(err)
	}
	return json.Marshal(rec)
}

func (g goController) DeleteNetwork(id ztnode.NetworkID) error {
	return controllerError(g.c.DeleteNetwork(id))
}

func (g goController) Members(id ztnode.NetworkID) ([]json.RawMessage, error) {
	if _, ok := g.c.Network(id); !ok {
		return nil, noNetwork(id)
	}
	out := []json.RawMessage{}
	for _, m := range g.c.Members(id) {
		b, err := json.Marshal(m)
		if err != nil {
			return nil, fmt.Errorf("member %s: %w", m.Address, err)
		}
		out = append(out, b)
	}
	return out, nil
}

func (g goController) Member(id ztnode.NetworkID, address string) (json.RawMessage, error) {
	a, err := config.MemberAddress(address)
	if err != nil {
		return nil, err
	}
	m, ok := g.c.Member(id, a)
	if !ok {
		return nil, fault.Usagef("member %s of network %s: not known to this controller", address, id)
	}
	return json.Marshal(m)
}

func (g goController) SetMember(id ztnode.NetworkID, address string, patch json.RawMessage) (json.RawMessage, error) {
	a, err := config.MemberAddress(address)
	if err != nil {
		return nil, err
	}
	m, err := g.c.UpdateMember(id, a, func(m *controller.Member) error { return m.Patch(patch) })
	return marshalRecord(m, err)
}

func (g goController) DeleteMember(id ztnode.NetworkID, address string) error {
	a, err := config.MemberAddress(address)
	if err != nil {
		return err
	}
	return controllerError(g.c.DeleteMember(id, a))
}
