package main

func drawAll(from, docs string) error { return nil }
