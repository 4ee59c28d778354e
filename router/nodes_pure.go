//go:build !libzt || !cgo

package router

const libztBuilt = false
