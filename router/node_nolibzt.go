//go:build !libzt || !cgo

package router

// newLibztNode is never called: [checkNode] refuses a node that isn't built in.
func newLibztNode(NodeConfig) (Node, error) { return nil, checkNode(NodeLibzt) }
