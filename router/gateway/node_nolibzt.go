//go:build !libzt || !cgo

package gateway

import "ztgate/router/config"

// newLibztNode is never called: [config.CheckNode] refuses a node that isn't built in.
func newLibztNode(NodeConfig) (Node, error) { return nil, config.CheckNode(config.NodeLibzt) }
