package router

import "errors"

// DefaultParts returns the node in pure Go and the forwarding plane of this
// module.
func DefaultParts() Parts {
	return Parts{
		NewNode:  func(NodeConfig) (Node, error) { return nil, errors.New("no node in this build") },
		NewPlane: newEngine,
	}
}
